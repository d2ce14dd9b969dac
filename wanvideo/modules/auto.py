"""Mode "auto": measure what is trusted at the real shape, and take the fastest that is accurate enough.

Once per shape, on the tensors of the first call; the answer is kept for the process.
"""

from __future__ import annotations

import functools
import logging
import statistics
from dataclasses import dataclass

import torch

from ..runtime.timing import milliseconds
from .attention import EMULATIONS, reasons_against, run_backend, set_auto_chooser
from .backends import backends

__all__ = ["MAX_RELATIVE_L2", "MIN_TOKENS", "Measurement", "choose", "measure"]

logger = logging.getLogger(__name__)

MAX_RELATIVE_L2 = 0.05
"""Against SDPA on the same tensors. 8-bit attention stays below it on Wan's activations, FP4 does not: who wants FP4's
speed asks for it by name."""

MIN_TOKENS = 2048
"""Below so many keys nothing gains enough to be worth measuring."""

REPEATS = 3

NOT_CANDIDATES = EMULATIONS | {"eager", "comfy", "comfy_kitchen_int8"}
"""The reference, what stands in for kernels, what another program chooses, and what is not finite for every input."""

_chosen: dict[tuple[object, ...], str] = {}


@dataclass(frozen=True)
class Measurement:
    """One backend at one shape: milliseconds (median), and relative L2 against SDPA."""

    backend: str
    milliseconds: float
    relative_l2: float


def measure(names: list[str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Measurement]:
    """Time backends side by side, in turns, so that a drifting clock hits all alike.

    Args:
        names: of backends that can serve the call, "sdpa" among them.
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D].
    """
    expected = run_backend("sdpa", q, k, v)
    norm = expected.float().norm().clamp_min(1e-12)
    # The first call of each compiles and warms up.
    errors = {name: float((run_backend(name, q, k, v) - expected).float().norm() / norm) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPEATS):
        for name in names:
            times[name].append(milliseconds(functools.partial(run_backend, name, q, k, v), q.device))
    return [Measurement(name, statistics.median(times[name]), errors[name]) for name in names]


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """The backend for a call: "sdpa" on the CPU, for few keys, and while a CUDA graph is captured."""
    if not q.is_cuda or k.shape[1] < MIN_TOKENS or torch.cuda.is_current_stream_capturing():
        return "sdpa"
    key = (q.device, q.dtype, tuple(q.shape), tuple(k.shape))
    if key not in _chosen:
        names = [b.name for b in backends() if b.name not in NOT_CANDIDATES and not reasons_against(b, q, k, v)]
        results = measure(names, q, k, v)
        _chosen[key] = fastest(results)
        table = ", ".join(f"{m.backend} {m.milliseconds:.2f} ms (error {m.relative_l2:.3f})" for m in results)
        logger.info("attention mode auto takes %s at %s: %s", _chosen[key], tuple(q.shape), table)
    return _chosen[key]


def fastest(results: list[Measurement]) -> str:
    """The fastest of those within `MAX_RELATIVE_L2`; NaN is never within."""
    accurate = [m for m in results if m.relative_l2 <= MAX_RELATIVE_L2]
    return min(accurate, key=lambda m: m.milliseconds).backend if accurate else "sdpa"


set_auto_chooser(choose)
