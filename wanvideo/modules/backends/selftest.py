"""Trial before trust: a kernel from a binary package runs in a child process first.

A CUDA fault cannot be caught: it poisons the process, and some kernels abort it. So a backend that comes from a
package is called once in a child, on aligned and on awkward inputs, and compared with the float32 reference. The
verdict is kept in a file, by GPU, driver, torch and package versions. A backend that faults, hangs or lies is refused
from then on with the reason.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import lookup, set_trial, unavailable_reasons
from .contract import Contract

__all__ = [
    "Verdict",
    "cache_file",
    "environment",
    "like_activations",
    "needs_trial",
    "reasons_from_trial",
    "run_trial",
    "verdict",
]

logger = logging.getLogger(__name__)

MIN_COSINE = 0.95
"""With the float32 reference on `like_activations`. NVFP4 gives 0.995 there, misread memory about 0."""

TIMEOUT = 180
"""Seconds for one child: importing torch, compiling a Triton kernel, a few calls. A hang is a verdict too."""

SWITCH = "INFINITETALK_TRIAL"

_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Verdict:
    """What came of one trial.

    Attributes:
        backend: its name.
        ok: whether it may be used.
        reason: why not, one clause; empty when ok.
        cosine: lowest cosine similarity with the float32 reference over the cases; None when it never answered.
        cases: how many cases it answered.
    """

    backend: str
    ok: bool
    reason: str = ""
    cosine: float | None = None
    cases: int = 0


def needs_trial(contract: Contract) -> bool:
    """Whether a backend's code comes from a binary package; our own kernels and torch's are covered by their tests."""
    return contract.package is not None


# ------------------------------------------------------------------------------------------------- the cache


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
        try:
            facts["package"] = f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            facts["package"] = f"{package} of unknown version"
    return facts


def cache_file() -> Path:
    """Where verdicts are kept: `INFINITETALK_CACHE`, or the user's cache folder."""
    folder = os.environ.get("INFINITETALK_CACHE")
    if folder is None:
        base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(base) / "wanvideo_infinitetalk")
    return Path(folder) / "trials.json"


def _key(name: str, device: torch.device) -> str:
    facts = json.dumps([name, environment(lookup(name).contract.package, device)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def _read_cache() -> dict[str, dict]:
    try:
        stored = json.loads(cache_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("verdicts of earlier trials in %s cannot be read (%s): trying again", cache_file(), error)
        return {}
    return stored if isinstance(stored, dict) else {}


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
            "the verdict on %s cannot be kept in %s (%s): it will be tried again", result.backend, path, error
        )


# ------------------------------------------------------------------------------------------------- the parent


# The child loads this package by its folder: inside ComfyUI it cannot be imported by name.
_BOOTSTRAP = """
import importlib.util, sys
root, name, device, plugin = sys.argv[1:5]
spec = importlib.util.spec_from_file_location(
    "wanvideo_infinitetalk", root + "/__init__.py", submodule_search_locations=[root]
)
package = importlib.util.module_from_spec(spec)
sys.modules["wanvideo_infinitetalk"] = package
spec.loader.exec_module(package)
from wanvideo_infinitetalk.wanvideo.modules.backends.selftest import child
child(name, device, plugin)
"""


def _plugin(name: str) -> str:
    """The file that registers a backend from outside this package, for the child to load; "" for our own."""
    source = inspect.getsourcefile(inspect.unwrap(lookup(name).run))
    if source is None or Path(source).resolve().is_relative_to(_ROOT):
        return ""
    return source


def _how_it_died(returncode: int, stderr: str) -> str:
    last = next((line for line in reversed(stderr.strip().splitlines()) if line.strip()), "")
    if returncode < 0:
        try:
            what = signal.Signals(-returncode).name
        except ValueError:
            what = f"signal {-returncode}"
        return f"it kills its process ({what}): {last}" if last else f"it kills its process ({what})"
    return f"it fails: {last}" if last else f"its process ends with code {returncode}"


def run_trial(name: str, device: torch.device, timeout: float = TIMEOUT) -> Verdict:
    """Try a backend in a child process, now.

    Args:
        name: of a registered backend.
        device: where it is to run.
        timeout: seconds until a hang is called one.
    """
    command = [sys.executable, "-c", _BOOTSTRAP, str(_ROOT), name, str(device), _plugin(name)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {SWITCH: "off"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(name, False, f"it does not answer within {timeout:g} seconds")
    except OSError as error:
        return Verdict(name, False, f"no child process can be started to try it ({error})")
    if done.returncode:
        return Verdict(name, False, _how_it_died(done.returncode, done.stderr))
    # Packages print while they are imported; the verdict is the last line.
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Verdict(**answer)


def verdict(name: str, device: torch.device, *, fresh: bool = False) -> Verdict:
    """The verdict on a backend for this machine: from the file when it is known there, otherwise by a trial.

    Args:
        fresh: try again even when the file knows it.
    """
    key = _key(name, device)
    if not fresh:
        stored = _read_cache().get(key)
        if stored is not None:
            return Verdict(**stored)
    logger.info("trying %s in a child process before it is trusted", name)
    result = run_trial(name, device)
    _write_cache(key, result)
    return result


def reasons_from_trial(name: str, device: torch.device) -> list[str]:
    """Reasons from the trial why a backend must not be used; empty when it may, or needs no trial.

    `INFINITETALK_TRIAL=off` trusts every installed package, at the user's own risk.
    """
    if os.environ.get(SWITCH, "").lower() == "off" or not needs_trial(lookup(name).contract):
        return []
    result = verdict(name, device)
    if result.ok:
        return []
    logger.warning("%s is refused: %s", name, result.reason)
    return [f"it failed its trial: {result.reason}"]


set_trial(reasons_from_trial)


# ------------------------------------------------------------------------------------------------- the child


def like_activations(
    shape: tuple[int, int, int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, L, H, D] float32 with the common offset per channel that a video model's have, K's the largest.

    It is what K smoothing is for (SageAttention, arXiv 2410.02367, section 4.2).
    """

    def part(spread: float, offset: float) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator) * spread
        return noise + torch.randn(1, 1, *shape[2:], generator=generator) * offset

    return part(2, 2), part(1, 8), part(1, 1)


def _cases(contract: Contract, device: torch.device) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Aligned and awkward q, k, v [B, L, H, D]; the awkward ones reach the kernel through the guard, as in real use."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if torch.bfloat16 in contract.dtypes else contract.dtypes[0]

    def moved(x: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(x.numel() + 1, dtype=dtype, device=device)
        view = storage[1:].view(x.shape)
        view.copy_(x)
        return view

    for dim in contract.head_dims or (64, 128):
        if dim not in (64, 128):
            continue
        for length in (512, 1000, 257):
            parts = like_activations((1, length, 4, dim), generator)
            yield f"{length} tokens, head_dim {dim}", [x.to(device, dtype) for x in parts]
        q, k, v = like_activations((2, 384, 4, dim), generator)
        fused = torch.stack((q, k, v), dim=2).to(device, dtype)
        yield f"slices of fused q, k, v, head_dim {dim}", list(fused.unbind(2))
        yield f"an odd start, head_dim {dim}", [moved(x) for x in (q, k, v)]
        yield f"large values, head_dim {dim}", [x.to(device, dtype) for x in (q, k, v * 300)]


def _judge(name: str, device: torch.device) -> Verdict:
    from ..attention import run_backend
    from .sdpa import eager_attention

    backend = lookup(name)
    missing = unavailable_reasons(name, device)
    if missing:
        return Verdict(name, False, "; ".join(missing))
    worst, count = 1.0, 0
    for case, (q, k, v) in _cases(backend.contract, device):
        before = [x.clone() for x in (q, k, v)]
        out = run_backend(name, q, k, v)
        expected = eager_attention(before[0].float(), before[1].float(), before[2].float())
        if not bool(torch.isfinite(out).all()):
            return Verdict(name, False, f"it gives non-finite numbers ({case})", worst, count)
        if not all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True)):
            return Verdict(name, False, f"it changes its inputs ({case})", worst, count)
        cosine = float(torch.cosine_similarity(out.double().flatten(), expected.double().flatten(), dim=0))
        worst, count = min(worst, cosine), count + 1
        if cosine < MIN_COSINE:
            return Verdict(name, False, f"it gives wrong numbers, cosine {cosine:.3f} ({case})", worst, count)
    return Verdict(name, True, "", worst, count)


def child(name: str, device: str, plugin: str = "") -> None:
    """Entry of the child process: judge one backend and write the verdict as the last line of the standard output."""
    if plugin:
        runpy.run_path(plugin)
    with torch.no_grad():
        result = _judge(name, torch.device(device))
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    sys.stdout.write("\n" + json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
