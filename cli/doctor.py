"""What runs on this machine: every attention mode and quantization, tried, with its accuracy and speed.

`infinitetalk doctor` and the node InfiniteTalkAttentionDoctor print the report; `--report` writes it as JSON.
"""

from __future__ import annotations

import functools
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..fp8_optimization import QUANTIZATIONS, Quantization, how_it_runs, quantize_linear
from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.kernels.packages import first_line, installed_version
from ..wanvideo.kernels.selftest import environment
from ..wanvideo.linear.base import relative_l2
from ..wanvideo.modules.attention import MODE_BACKENDS, run_backend
from ..wanvideo.modules.backends import lookup, unavailable_reasons
from ..wanvideo.modules.backends.selftest import like_activations
from ..wanvideo.runtime.timing import milliseconds

__all__ = ["PRECISIONS", "KernelRow", "LinearRow", "Report", "examine"]

PRECISIONS = {"16-bit": ("sdpa",), "8-bit": ("sageattn_3_fp8",), "4-bit": ("sageattn_3_fp4",)}
"""Precision -> the modes of which at least one must be supported for the machine to be well."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel of one attention mode.

    Attributes:
        supported: whether the mode may use it here. first: whether it is the one that the mode takes.
        reasons: why it is not supported; empty when it is.
        cosine, relative_l2: against the float32 reference; None when it is not supported.
        bound: relative L2 that it keeps on the hardest input.
        milliseconds, speedup: of one call, and how many times faster than SDPA in the same run.
        advice: what to install for it to be supported; empty when nothing helps or nothing is needed.
    """

    mode: str
    kernel: str
    version: str
    supported: bool
    first: bool
    reasons: tuple[str, ...] = ()
    cosine: float | None = None
    relative_l2: float | None = None
    bound: float | None = None
    milliseconds: float | None = None
    speedup: float | None = None
    advice: str = ""

    @property
    def verdict(self) -> str:
        if not self.supported:
            return "; ".join(self.reasons)
        return "runs" if self.first else "could run"


@dataclass(frozen=True)
class LinearRow:
    """One quantization of the linear layers: how it runs here, its error and its speed against 16 bits."""

    quantization: str
    how: str
    relative_l2: float | None
    speedup: float | None
    supported: bool = True


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
        """Whether at least one mode of each precision is supported."""
        return all(self.precisions.values())

    def as_json(self) -> dict[str, Any]:
        """For a bug report: plain lists, dictionaries, numbers and strings."""
        return asdict(self) | {"healthy": self.healthy}


def _in_turns(
    call: Callable[[], object], baseline: Callable[[], object], device: torch.device, rounds: int = 3
) -> tuple[float, float]:
    """(median milliseconds of `call`, how many times as fast as `baseline`), in turns, because clocks drift."""
    call()
    times = [(milliseconds(baseline, device), milliseconds(call, device)) for _ in range(rounds)]
    return statistics.median(ms for _, ms in times), statistics.median(base / ms for base, ms in times)


def _errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(cosine similarity, relative L2 error), in float64."""
    cosine = torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0)
    return float(cosine), relative_l2(actual, expected)


def _advice(name: str, reasons: tuple[str, ...]) -> str:
    """What to install: only where the package is all that is missing."""
    package = lookup(name).contract.device.package
    missing = [r for r in reasons if r.endswith("is not installed") or "it needs" in r]
    if package is None or not missing or len(missing) < len(reasons):
        return ""
    return f"install {package.name} {package.versions}"


def _version(name: str) -> str:
    package = lookup(name).contract.package
    if package is not None:
        return installed_version(package) or "-"
    return f"torch {torch.__version__}" if name == "sdpa" else "built in"


def _examine_kernels(device: torch.device, shape: tuple[int, int, int, int]) -> list[KernelRow]:
    parts = like_activations(shape, torch.Generator().manual_seed(0))
    q, k, v = (x.to(device, torch.bfloat16) for x in parts)
    expected = run_backend("eager", q.float(), k.float(), v.float())
    sdpa = functools.partial(run_backend, "sdpa", q, k, v)
    sdpa()

    def measure(name: str) -> KernelRow:
        reasons = unavailable_reasons(name, device)
        row = KernelRow("", name, _version(name), False, False, reasons, advice=_advice(name, reasons))
        if reasons:
            return row
        try:
            cosine, relative_l2 = _errors(run_backend(name, q, k, v), expected)
            spent, speedup = _in_turns(functools.partial(run_backend, name, q, k, v), sdpa, device)
        except InfiniteTalkError as error:
            return KernelRow("", name, row.version, False, False, (str(error),))
        except RuntimeError as error:  # whatever a kernel raises is a line of the report, not its end
            return KernelRow("", name, row.version, False, False, (f"it fails: {first_line(error)}",))
        bound = lookup(name).bound[q.dtype]
        return KernelRow("", name, row.version, True, False, (), cosine, relative_l2, bound, spent, speedup)

    measured = {name: measure(name) for name in dict.fromkeys(chain(*MODE_BACKENDS.values()))}
    rows = []
    for mode, names in MODE_BACKENDS.items():
        first = next((name for name in names if measured[name].supported), None)
        rows += [replace(measured[name], mode=mode, first=name == first) for name in names]
    return rows


def _examine_linears(device: torch.device, rows: int, features: int) -> list[LinearRow]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = nn.Linear(features, features).to(device, torch.bfloat16).requires_grad_(False)
        x = torch.randn(rows, features).to(device, torch.bfloat16)
    expected = nn.functional.linear(x.float(), reference.weight.float(), reference.bias.float())
    plain = functools.partial(reference, x)
    plain()
    found = []
    for quantization in QUANTIZATIONS:
        linear = nn.Linear(features, features, device=device, dtype=torch.bfloat16).requires_grad_(False)
        linear.load_state_dict(reference.state_dict())
        try:
            quantize_linear(linear, Quantization.parse(quantization), torch.bfloat16)
            error = relative_l2(linear(x), expected)
            _, speedup = _in_turns(functools.partial(linear, x), plain, device)
            found.append(LinearRow(quantization, how_it_runs(linear, device), error, speedup))
        except InfiniteTalkError as failure:
            found.append(LinearRow(quantization, str(failure), None, None, supported=False))
    return found


def examine(device: torch.device) -> Report:
    """Try every attention kernel and every quantization on `device`.

    Kernels of binary packages are tried in child processes first, unless an earlier verdict is known.
    """
    cuda = device.type == "cuda"
    shape = (1, 8192, 16, 128) if cuda else (1, 384, 2, 128)
    with torch.no_grad():
        kernels = _examine_kernels(device, shape)
        linears = _examine_linears(device, 8192 if cuda else 64, 5120 if cuda else 256)
    working = {row.mode for row in kernels if row.supported}
    precisions = {name: any(mode in working for mode in modes) for name, modes in PRECISIONS.items()}
    machine = {"system": platform.platform(), **environment(None, device)}
    return Report(machine, kernels, linears, shape, precisions)
