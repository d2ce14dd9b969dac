"""Self-tests: is a kernel right on this GPU? One mechanism for all kernels, which ask nothing of it themselves.

A self-test compares what a kernel gives with the reference on small inputs and ends in a `Verdict`. This project's
Triton kernels are compared in this process, on GPUs that the test suite has not run on. Code from a binary package runs
in a child process first, because a CUDA fault poisons the process and some kernels abort it; that verdict is kept in a
file, by GPU, driver, torch and package versions. What is compared for a package: `modules/backends/selftest.py`.

Answers are kept in `SELF_TESTS`: for the process, until its `reset`. Three things are never kept: an exception that
leaves a self-test, a GPU that was full when kernels were tried, and an answer while a CUDA graph is captured, when
nothing may wait for the GPU.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from . import contract, packages, reference
from .contract import Contract, Device
from .rope import Rotation

__all__ = [
    "SELF_TESTS",
    "SWITCH",
    "Comparison",
    "SelfTests",
    "Verdict",
    "cache_file",
    "device_reasons",
    "eager_reasons",
    "elementwise_reasons",
    "environment",
    "in_child",
    "judge",
    "kept_verdict",
    "native_fp4_reasons",
    "switched_off",
]

logger = logging.getLogger(__name__)

SWITCH = "INFINITETALK_TRIAL"
"""Environment variable: "off" uses packages without their self-test, at the user's own risk."""

TIMEOUT = 180
"""Seconds for one child: importing torch, compiling a Triton kernel, a few calls. A hang is a verdict too."""

_ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------- verdicts and kept answers


@dataclass(frozen=True)
class Verdict:
    """What came of one self-test.

    Attributes:
        backend: what was tested.
        ok: whether it may be used.
        reason: why not, one clause; empty when ok.
        cosine: lowest cosine similarity with the reference over the cases, where the self-test measures it.
        cases: how many cases it was right in.
    """

    backend: str
    ok: bool
    reason: str = ""
    cosine: float | None = None
    cases: int = 0


Comparison = tuple[str, Any, Any]
"""One case of a self-test: its name, what a kernel gives, what the reference does."""


def judge(name: str, comparisons: Iterable[Comparison], fault: Callable[[Any, Any], str]) -> Verdict:
    """The verdict over all cases; `fault(actual, expected)` says what is wrong, "" when nothing is.

    Whatever a compiler, a driver or a kernel raises is the reason, but for a GPU out of memory, which says nothing of
    the kernel and is raised.
    """
    right, wrong = 0, dict[str, list[str]]()
    try:
        for case, actual, expected in comparisons:
            clause = fault(actual, expected)
            if clause:
                wrong.setdefault(clause, []).append(case)
            right += not clause
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        wrong[shorten(packages.first_line(error), 120, placeholder=" ...")] = []
    reason = "; ".join(f"{clause} ({', '.join(cases)})" if cases else clause for clause, cases in wrong.items())
    return Verdict(name, not wrong, reason, cases=right)


def _reasons_of(verdict: Verdict, sentence: str, consequence: str) -> list[str]:
    """`sentence` with the verdict's reason, which is logged together with its consequence; nothing where it is ok."""
    if verdict.ok:
        return []
    reason = sentence.format(verdict.reason)
    logger.warning("%s%s%s", reason[0].upper(), reason[1:], consequence)
    return [reason]


class _NotNowError(Exception):
    """A self-test that cannot be made at this moment."""


def _not_while_capturing(device: torch.device) -> None:
    """A comparison waits for the GPU, which the capture of a CUDA graph does not allow."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise _NotNowError("it was not tried on this GPU before a CUDA graph was captured")


class SelfTests:
    """Answers to questions about devices that are asked once: question and device -> reasons against."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: dict[tuple[Hashable, torch.device], tuple[str, ...]] = {}

    def reasons(self, question: Hashable, device: torch.device, ask: Callable[[], Sequence[str]]) -> tuple[str, ...]:
        """The kept answer, or that of `ask`, which is kept unless it raises."""
        key = (question, device)
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        with self._lock:
            if key not in self._kept:
                try:
                    self._kept[key] = tuple(ask())
                except _NotNowError as error:
                    return (str(error),)
            return self._kept[key]

    def reset(self) -> None:
        """Forget every answer: a package was installed, or a fake put in its place."""
        with self._lock:
            self._kept.clear()


SELF_TESTS = SelfTests()


# ----------------------------------------------------------------------------------------- in this process: Triton's


def device_reasons(needs: Device, device: torch.device) -> tuple[str, ...]:
    """Every reason why no kernel that needs this can run on `device`, that Triton builds none among them. Kept."""

    def ask() -> Sequence[str]:
        found = contract.device_reasons(needs, device)
        if needs.triton and device.type == "cuda" and found == [packages.triton_import_reason()]:
            _warn_without_triton(found[0])
        return found or (_triton_build_reasons(device) if needs.triton else ())

    return SELF_TESTS.reasons(needs, device, ask)


def _warn_without_triton(reason: str) -> None:
    """Say once per process what is missing where a Triton kernel would otherwise run."""

    def ask() -> list[str]:
        logger.warning("%s. Until then PyTorch runs what Triton kernels would, slower.", reason)
        return [reason]

    SELF_TESTS.reasons("triton import", torch.device("cuda"), ask)


def _triton_build_reasons(device: torch.device) -> tuple[str, ...]:
    """Why no kernel can be built and launched: Triton needs a C compiler and Python's headers for that."""

    def ask() -> list[str]:
        from . import _probe_triton

        def launched() -> Iterator[Comparison]:
            with torch.cuda.device(device):
                _probe_triton.store_one[1,](torch.empty(1, dtype=torch.int32, device=device))
            yield "a launch", None, None

        return _reasons_of(
            judge("Triton", launched(), lambda *_: ""),
            "Triton cannot build a kernel here ({}); install a C compiler (gcc) and the headers of this Python",
            ".",
        )

    return SELF_TESTS.reasons("triton build", device, ask)


SUITE_RAN_ON = ((9, 0),)
"""Compute capabilities on which tests/cuda has passed. On others the elementwise kernels are compared first."""

DTYPE = torch.bfloat16
TOLERANCE = 2 * torch.finfo(DTYPE).eps
"""A right kernel is within one unit in the last place of the eager form; one that misreads memory is nowhere near."""

E4M3_STEP = 2.0**-3
"""One unit in the last place of e4m3."""


def elementwise_reasons(needs: Device, device: torch.device) -> tuple[str, ...]:
    """Every reason why the kernels of `fused` and `linear` that need this cannot be used on `device`. Kept."""

    def ask() -> list[str]:
        if packages.capability(device) in SUITE_RAN_ON:
            return []
        _not_while_capturing(device)
        return _reasons_of(
            judge("elementwise", _elementwise_comparisons(device), _ulp_fault),
            "the elementwise kernels do not give PyTorch's numbers on this GPU: {}",
            ". PyTorch's own run instead. Please report it.",
        )

    return device_reasons(needs, device) or SELF_TESTS.reasons("elementwise", device, ask)


@torch.no_grad()
def _elementwise_comparisons(device: torch.device) -> Iterator[Comparison]:
    """Every kernel and its eager form, on small random inputs of a generator of their own."""
    from . import frames, fused, linear

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, y = random(2, 5, 192).to(DTYPE), random(2, 5, 192).to(DTYPE)
    weight, bias = random(192).to(DTYPE), random(192).to(DTYPE)
    shift, scale, gate = random(2, 6, 192).split(1, dim=1)[:3]
    angles = random(5, 1, 32)
    calls: dict[str, tuple[Any, ...]] = {
        "modulated_norm": (x, shift, scale, 1e-6),
        "affine_norm": (x, weight, bias, 1e-6),
        "rms_norm": (x, weight, 1e-6),
        "qk_norm_rope": (x, y, weight, bias, Rotation(angles.cos(), angles.sin()), 3, 1e-6),
        "gated_residual": (x, y, gate),
        "add_modulated_norm": (x, y, gate, shift, scale, 1e-6),
        "add_affine_norm": (x, y, 0.5, weight, bias, 1e-6),
    }
    for group, call in calls.items():
        yield group, getattr(fused, group)(*call), getattr(reference, group)(*call)
    scaling = (random(10, 192), random(10, 1), random(1, 192), bias, DTYPE)
    yield "scale_product", linear.scale_product(*scaling), reference.scale_product(*scaling)
    if device.type != "cuda" or not contract.device_reasons(linear.QUANTIZE_ROWS.device, device):
        rows = x.flatten(0, 1)
        yield "quantize_rows", linear.quantize_rows(rows), reference.quantize_rows(rows)
        for group, call in {"add_rows": (x, y), "gelu_rows": (x,)}.items():
            yield group, getattr(fused, group)(*call), getattr(reference, group)(*call)
        quantized = (x, shift, scale, 1e-6, True)
        yield "rows of a norm", fused.modulated_norm(*quantized), reference.modulated_norm(*quantized)
    video, past = random(1, 3, 4, 5, 96).to(DTYPE), random(1, 2, 4, 5, 96).to(DTYPE)
    padding = (video, weight[:96], video.flip(1), bias[:96], past, 2, 1, 1, True)
    yield "pad_frames", frames.pad_frames(*padding), reference.pad_frames(*padding)
    doubling = (video, weight[:96], None, 2)
    yield "upsample_frames", frames.upsample_frames(*doubling), reference.upsample_frames(*doubling)


def _ulp_fault(actual: Any, expected: Any) -> str:
    if isinstance(expected, tuple):
        return next(filter(None, map(_ulp_fault, actual, expected)), "")
    step = E4M3_STEP if expected.dtype == torch.float8_e4m3fn else TOLERANCE
    close = torch.allclose(actual.float(), expected.float(), rtol=step, atol=step)
    return "" if actual.dtype == expected.dtype and close else "other numbers"


def eager_reasons(
    needs: Contract, tensors: Sequence[torch.Tensor | contract.Described | None], **given: Any
) -> Sequence[str]:
    """Every reason why the eager form computes a call and not the kernel of a contract; empty when the kernel does.

    Args:
        tensors, given: as `contract.reasons` takes them.
    """
    if torch.compiler.is_compiling():
        return ("torch.compile fuses the eager form",)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
        return ("the kernel has no gradients",)
    device = tensors[0].device  # type: ignore[union-attr]
    found, never = contract.reasons(needs, tensors, **given), device_reasons(needs.device, device)
    if found or never:
        return list(dict.fromkeys((*found, *never)))
    return elementwise_reasons(needs.device, device)


NATIVE_TOLERANCE = 0.08
"""Relative L2 between the two FP4 kernels beyond which the native one is not used. They differ in the tiles over which
the running maximum, to which P is scaled, grows; the scales of P round differently then."""


def native_fp4_reasons(device: torch.device) -> tuple[str, ...]:
    """Why `sage_fp4` should not multiply packed FP4 values on `device`; empty when it should. Kept."""
    from . import sage_fp4

    @torch.no_grad()
    def comparison() -> Iterator[Comparison]:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(1, 300, 2, 128, device=device, generator=generator).bfloat16() for _ in range(3))
        with torch.cuda.device(device):
            wanted, got = (sage_fp4.run(q, k, v, 128**-0.5, native).float() for native in (False, True))
        yield "300 tokens", got, wanted

    def fault(actual: torch.Tensor, expected: torch.Tensor) -> str:
        error = float((actual - expected).norm() / expected.norm())
        return "" if error <= NATIVE_TOLERANCE else f"{error:.3f} off the bf16 one, relative L2"

    def ask() -> Sequence[str]:
        if found := contract.device_reasons(sage_fp4.NATIVE, device):
            return found
        if packages.triton_version() < sage_fp4.NATIVE_TRITON:
            return [f"Triton {packages.triton_version()} is older than {sage_fp4.NATIVE_TRITON}"]
        _not_while_capturing(device)
        return _reasons_of(
            judge("FP4 tensor cores", comparison(), fault),
            "the FP4 tensor-core kernel is wrong on this GPU: {}",
            "; the bf16 one runs instead",
        )

    return SELF_TESTS.reasons("native FP4", device, ask)


# ------------------------------------------------------------------------------------- in a child process: packages'


def switched_off() -> bool:
    """Whether the user has switched the self-tests of packages off."""
    return os.environ.get(SWITCH, "").lower() == "off"


@functools.cache
def _driver(index: int) -> str:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def environment(package: str | None, device: torch.device) -> dict[str, str]:
    """What a verdict depends on: GPU, driver, torch and package versions."""
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "device": device.type}
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        facts |= {
            "gpu": torch.cuda.get_device_name(index),
            "capability": f"{major}.{minor}",
            "driver": _driver(index),
            "cuda": torch.version.cuda or "",
        }
    if package is not None:
        facts["package"] = f"{package} {packages.installed_version(package) or 'of unknown version'}"
    return facts


def cache_file() -> Path:
    """Where verdicts are kept: `INFINITETALK_CACHE`, the user's cache folder, or for a user without a home the one for
    temporary files."""
    folder = os.environ.get("INFINITETALK_CACHE")
    if folder is None:
        base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.path.expanduser(f"{base}/wanvideo_infinitetalk")
        if folder.startswith("~"):
            user = os.getuid() if hasattr(os, "getuid") else ""
            folder = f"{tempfile.gettempdir()}/wanvideo_infinitetalk-{user}"
    return Path(folder) / "trials.json"


def _key(name: str, package: str | None, device: torch.device) -> str:
    facts = json.dumps([name, environment(package, device)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def _read_cache() -> dict[str, Any]:
    try:
        stored = json.loads(cache_file().read_bytes())
        if not isinstance(stored, dict):
            raise TypeError(f"a {type(stored).__name__} instead of a table")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("verdicts of earlier self-tests in %s cannot be read (%s): testing again", cache_file(), error)
        return {}
    return stored


def _verdict(stored: object) -> Verdict | None:
    """The verdict that a cache's entry states; None for an entry that is none."""
    kinds: dict[str, list[type]] = {"backend": [str], "ok": [bool], "reason": [str], "cases": [int]}
    kinds["cosine"] = [float, int, type(None)]
    if not isinstance(stored, dict) or stored.keys() != kinds.keys():
        return None
    return Verdict(**stored) if all(type(stored[name]) in kind for name, kind in kinds.items()) else None


def _write_cache(key: str, result: Verdict) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = _read_cache() | {key: asdict(result)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(stored, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning(
            "the verdict on %s cannot be kept in %s (%s): it will be tested again", result.backend, path, error
        )


def kept_verdict(name: str, package: str | None, device: torch.device, test: Callable[[], Verdict]) -> Verdict:
    """The verdict on code from a package on this machine: from the file when it is known there, else from `test`."""
    key = _key(name, package, device)
    entries = _read_cache()
    stored = _verdict(entries.get(key))
    if stored is not None:
        return stored
    if key in entries:
        logger.warning("the verdict on %s in %s is damaged: testing again", name, cache_file())
    logger.info("testing %s in a child process before its first use", name)
    result = test()
    _write_cache(key, result)
    return result


# The child loads this package by its folder: inside ComfyUI it cannot be imported by name.
_BOOTSTRAP = """
import importlib, importlib.util, sys
root, module, function, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "wanvideo_infinitetalk", root + "/__init__.py", submodule_search_locations=[root]
)
package = importlib.util.module_from_spec(spec)
sys.modules["wanvideo_infinitetalk"] = package
spec.loader.exec_module(package)
getattr(importlib.import_module("wanvideo_infinitetalk." + module), function)(*arguments)
"""


def in_child(name: str, module: str, function: str, *arguments: str, timeout: float = TIMEOUT) -> Verdict:
    """The verdict that a child process writes as the last line of its output; its death or silence is one too.

    Args:
        name: of what is tested.
        module, function: what the child calls with `arguments`, below this package.
        timeout: seconds until a hang is called one.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BOOTSTRAP, str(_ROOT), module, function, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {SWITCH: "off"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(name, False, f"it does not answer within {timeout:g} seconds")
    except OSError as error:
        return Verdict(name, False, f"no child process can be started to test it ({error})")
    if done.returncode:
        return Verdict(name, False, _how_it_died(done.returncode, done.stderr))
    # Packages print while they are imported; the verdict is the last line.
    return Verdict(**json.loads(done.stdout.strip().splitlines()[-1]))


def _how_it_died(returncode: int, stderr: str) -> str:
    last = next((line for line in reversed(stderr.strip().splitlines()) if line.strip()), "")
    if returncode < 0:
        try:
            what = signal.Signals(-returncode).name
        except ValueError:
            what = f"signal {-returncode}"
        return f"it kills its process ({what}): {last}" if last else f"it kills its process ({what})"
    return f"it fails: {last}" if last else f"its process ends with code {returncode}"
