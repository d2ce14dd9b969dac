"""Mode "auto": measure what passed its self-test at the real shape, and take the fastest that is accurate enough.

Once per shape, on the tensors of the first call; the answer is kept for the process.
"""

from __future__ import annotations

import functools
import logging
import statistics
from dataclasses import dataclass

import torch

from ..kernels.inputs import Inputs
from ..runtime.timing import milliseconds
from .backends import RUNTIME

__all__ = ["MAX_RELATIVE_L2", "MIN_TOKENS", "Measurement", "choose", "measure"]

logger = logging.getLogger(__name__)

MAX_RELATIVE_L2 = 0.05
"""Against SDPA on the same tensors. 8-bit attention stays below it on Wan's activations, FP4 does not: who wants FP4's
speed asks for it by name."""

MIN_TOKENS = 2048
"""Below so many keys nothing gains enough to be worth measuring."""

REPEATS = 3

NOT_CANDIDATES = ("eager", "comfy")
"""The reference, and what another program chooses. Emulations of kernels are none either."""


@dataclass(frozen=True)
class Measurement:
    """One backend at one shape: milliseconds (median), and relative L2 against SDPA."""

    backend: str
    milliseconds: float
    relative_l2: float


def measure(names: list[str], inputs: Inputs) -> list[Measurement]:
    """Time backends one after the other, in turns, so that a drifting clock hits all alike.

    Args:
        names: of backends that support the call, "sdpa" among them.
        inputs: without mask.
    """
    expected = RUNTIME.run("sdpa", inputs)
    norm = expected.float().norm().clamp_min(1e-12)
    # The first call of each compiles and warms up.
    errors = {name: float((RUNTIME.run(name, inputs) - expected).float().norm() / norm) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPEATS):
        for name in names:
            times[name].append(milliseconds(functools.partial(RUNTIME.run, name, inputs), inputs.q.device))
    return [Measurement(name, statistics.median(times[name]), errors[name]) for name in names]


def choose(inputs: Inputs) -> str:
    """The backend for a call: "sdpa" on the CPU, for few keys, and while a CUDA graph is captured."""
    q, k = inputs.q, inputs.k
    if not q.is_cuda or inputs.keys < MIN_TOKENS or torch.cuda.is_current_stream_capturing():
        return "sdpa"
    plain = Inputs(q, k, inputs.v)

    def measured() -> str:
        names = [
            backend.name
            for backend in RUNTIME.backends()
            if backend.name not in NOT_CANDIDATES and not backend.emulation and not RUNTIME.reasons(backend, plain)
        ]
        results = measure(names, plain)
        name = fastest(results)
        table = ", ".join(f"{m.backend} {m.milliseconds:.2f} ms (error {m.relative_l2:.3f})" for m in results)
        logger.info("attention mode auto takes %s at %s: %s", name, tuple(q.shape), table)
        return name

    return RUNTIME.chosen((q.device, q.dtype, q.shape, k.shape), measured)


def fastest(results: list[Measurement]) -> str:
    """The fastest of those within `MAX_RELATIVE_L2`; NaN is never within."""
    accurate = [m for m in results if m.relative_l2 <= MAX_RELATIVE_L2]
    return min(accurate, key=lambda m: m.milliseconds).backend if accurate else "sdpa"
