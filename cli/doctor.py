"""What runs on this machine: every attention mode and quantisation, tried, with its accuracy and speed.

`infinitetalk doctor` and the node WanVideoAttentionDoctor print the report; `--report` writes it as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .. import fp8_optimization
from ..fp8_optimization import QUANTIZATIONS, fp8_matmul_violations, quantize_linears
from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.linear.base import relative_l2
from ..wanvideo.linear.nvfp4 import nvfp4_matmul_violations
from ..wanvideo.modules.attention import MODE_BACKENDS, run_backend
from ..wanvideo.modules.backends import lookup, unavailable_reasons
from ..wanvideo.modules.backends import selftest as trial
from ..wanvideo.modules.backends.packages import installed_version
from ..wanvideo.runtime.timing import milliseconds

__all__ = ["PRECISIONS", "KernelRow", "LinearRow", "Report", "examine"]

PRECISIONS = {"16-bit": ("sdpa",), "8-bit": ("sageattn_3_fp8",), "4-bit": ("sageattn_3_fp4",)}
"""Precision -> the modes of which at least one must serve for the machine to be well."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel of one attention mode.

    Attributes:
        serves: whether the mode may use it here. first: whether it is the one that the mode takes.
        reasons: why it does not serve; empty when it does.
        cosine, relative_l2: against the float32 reference; None when it does not serve.
        milliseconds, speedup: of one call, and how many times faster than SDPA in the same run.
        advice: what to install for it to serve; empty when nothing helps or nothing is needed.
    """

    mode: str
    kernel: str
    version: str
    serves: bool
    first: bool
    reasons: tuple[str, ...] = ()
    cosine: float | None = None
    relative_l2: float | None = None
    milliseconds: float | None = None
    speedup: float | None = None
    advice: str = ""

    @property
    def verdict(self) -> str:
        if not self.serves:
            return "; ".join(self.reasons)
        return "serves" if self.first else "would serve"


@dataclass(frozen=True)
class LinearRow:
    """One quantisation of the linear layers: how it runs here, its error and its speed against 16 bits."""

    quantization: str
    how: str
    relative_l2: float | None
    speedup: float | None
    serves: bool = True


@dataclass(frozen=True)
class Report:
    """Everything that the doctor found."""

    environment: dict[str, str]
    kernels: list[KernelRow]
    linears: list[LinearRow]
    shape: tuple[int, ...]
    precisions: dict[str, bool] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether at least one mode of each precision serves."""
        return all(self.precisions.values())

    def as_json(self) -> dict[str, Any]:
        """For a bug report: plain lists, dictionaries, numbers and strings."""
        return asdict(self) | {"healthy": self.healthy}


def _beside(
    call: Callable[[], object], baseline: Callable[[], object], device: torch.device, rounds: int = 3
) -> tuple[float, float]:
    """(median milliseconds of `call`, how many times as fast as `baseline`), in turns, because clocks drift."""
    call()
    times = [(milliseconds(baseline, device), milliseconds(call, device)) for _ in range(rounds)]
    return statistics.median(own for _, own in times), statistics.median(base / own for base, own in times)


def _errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(cosine similarity, relative L2 error), in float64."""
    cosine = torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0)
    return float(cosine), relative_l2(actual, expected)


def _advice(name: str, reasons: tuple[str, ...]) -> str:
    """What to install: only where the package is all that is missing."""
    contract = lookup(name).contract
    missing = [r for r in reasons if r.endswith("is not installed") or "it needs" in r]
    if contract.package is None or not missing or len(missing) < len(reasons):
        return ""
    return f"install {contract.package} {contract.versions}".strip()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _version(name: str) -> str:
    contract = lookup(name).contract
    if contract.package is not None:
        return installed_version(contract.package) or "-"
    return f"torch {torch.__version__}" if name == "sdpa" else "built in"


def _examine_kernels(device: torch.device, shape: tuple[int, int, int, int]) -> list[KernelRow]:
    parts = trial.like_activations(shape, torch.Generator().manual_seed(0))
    q, k, v = (x.to(device, torch.bfloat16) for x in parts)
    expected = run_backend("eager", q.float(), k.float(), v.float())
    sdpa = functools.partial(run_backend, "sdpa", q, k, v)
    sdpa()
    measured: dict[str, KernelRow] = {}

    def measure(name: str) -> KernelRow:
        reasons = unavailable_reasons(name, device)
        row = KernelRow("", name, _version(name), False, False, reasons, advice=_advice(name, reasons))
        if reasons:
            return row
        try:
            cosine, relative_l2 = _errors(run_backend(name, q, k, v), expected)
            spent, speedup = _beside(functools.partial(run_backend, name, q, k, v), sdpa, device)
        except InfiniteTalkError as error:
            return KernelRow("", name, row.version, False, False, (str(error),))
        except RuntimeError as error:  # whatever a kernel raises is a line of the report, not its end
            return KernelRow("", name, row.version, False, False, (f"it fails: {_first_line(error)}",))
        return KernelRow("", name, row.version, True, False, (), cosine, relative_l2, spent, speedup)

    rows = []
    for mode, names in MODE_BACKENDS.items():
        first = True
        for name in names:
            if name not in measured:
                measured[name] = measure(name)
            found = measured[name]
            rows.append(KernelRow(**(asdict(found) | {"mode": mode, "first": found.serves and first})))
            first = first and not found.serves
    return rows


def _how(quantization: str, features: int, device: torch.device) -> str:
    if quantization == "disabled":
        return "16-bit weights and matmul"
    if quantization == "fp4_scaled":
        reasons = nvfp4_matmul_violations(features, features, torch.bfloat16, device)
        return "FP4 matmul" if not reasons else f"FP4 weights, unpacked per call: {'; '.join(reasons)}"
    if not quantization.endswith("_fast"):
        return "8-bit weights, unpacked per call"
    weight = torch.empty(features, features, dtype=torch.float8_e4m3fn, device=device)
    reasons = fp8_matmul_violations(weight, torch.bfloat16, device)
    if reasons:
        return f"8-bit weights, unpacked per call: {'; '.join(reasons)}"
    return "8-bit matmul" if device.type == "cuda" else "8-bit matmul, its numbers computed in float32"


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Leave out what is worth a line when a model is loaded, not when a table is made."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _examine_linears(device: torch.device, rows: int, features: int) -> list[LinearRow]:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    reference = nn.Linear(features, features).to(device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, features).to(device, torch.bfloat16)
    torch.random.set_rng_state(torch_state)
    expected = nn.functional.linear(x.float(), reference.weight.float(), reference.bias.float())
    plain = functools.partial(reference, x)
    plain()
    found = []
    for quantization in QUANTIZATIONS:
        linear = nn.Linear(features, features, device=device, dtype=torch.bfloat16).requires_grad_(False)
        linear.load_state_dict(reference.state_dict())
        model = nn.ModuleDict({"blocks": nn.ModuleList([linear])})
        how = _how(quantization, features, device)
        try:
            with _quiet(fp8_optimization.log):
                quantize_linears(model, quantization, torch.bfloat16)
            layer = model["blocks"][0]  # type: ignore[index]
            error = _errors(layer(x), expected)[1]
            _, speedup = _beside(functools.partial(layer, x), plain, device)
            found.append(LinearRow(quantization, how, error, speedup))
        except InfiniteTalkError as failure:
            found.append(LinearRow(quantization, str(failure), None, None, serves=False))
    return found


def examine(device: torch.device) -> Report:
    """Try every attention kernel and every quantisation on `device`.

    Kernels of binary packages are tried in child processes first, unless an earlier verdict is known.
    """
    cuda = device.type == "cuda"
    shape = (1, 8192, 16, 128) if cuda else (1, 384, 2, 128)
    with torch.no_grad():
        kernels = _examine_kernels(device, shape)
        linears = _examine_linears(device, 8192 if cuda else 64, 5120 if cuda else 256)
    serving = {row.mode for row in kernels if row.serves}
    precisions = {name: any(mode in serving for mode in modes) for name, modes in PRECISIONS.items()}
    machine = {"system": platform.platform(), **trial.environment(None, device)}
    return Report(machine, kernels, linears, shape, precisions)
