"""How long a call takes among others, as in a model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["milliseconds", "per_call"]

LASTING = 25.0
MOST = 100


def milliseconds(call: Callable[[], object], device: torch.device, lasting: float = LASTING) -> float:
    """Milliseconds per call on `device`, of as many in a row as last about `lasting` milliseconds.

    In a row, because between the layers of a model a GPU never idles: launches hide behind earlier work, and clocks are
    those that the power limit allows under load. Call it once more before, if it compiles something.
    """
    spent = per_call(call, device, 1)
    times = min(MOST, round(lasting / max(spent, 1e-3)))
    return per_call(call, device, times) if times > 1 else spent


def per_call(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Milliseconds of one call of `times` in a row that begin on an idle device, its launches included."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) * 1e3 / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed / times
