"""Our elementwise kernels against eager PyTorch, on a GPU that the suite has not run on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from . import reference
from .rope import Rotation

__all__ = ["disagreements"]

logger = logging.getLogger(__name__)

DTYPE = torch.bfloat16
TOLERANCE = 2 * torch.finfo(DTYPE).eps
"""A right kernel is within one unit in the last place of the eager form; one that misreads memory is nowhere near."""

E4M3_STEP = 2.0**-3
"""One unit in the last place of e4m3."""


def _pairs(device: torch.device) -> Iterator[tuple[str, Any, Any]]:
    """(kernel, what it gives, what eager gives), on small random inputs of its own generator."""
    from . import fused, linear

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
    }
    for group, call in calls.items():
        yield group, getattr(fused, group)(*call), getattr(reference, group)(*call)
    scaling = (random(10, 192), random(10, 1), random(1, 192), bias, DTYPE)
    yield "scale_product", linear.scale_product(*scaling), reference.scale_product(*scaling)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= linear.MIN_CAPABILITY:
        rows = x.flatten(0, 1)
        yield "quantize_rows", linear.quantize_rows(rows), reference.quantize_rows(rows)


def _equal(ours: Any, eager: Any) -> bool:
    if isinstance(eager, tuple):
        return all(_equal(a, b) for a, b in zip(ours, eager, strict=True))
    step = E4M3_STEP if eager.dtype == torch.float8_e4m3fn else TOLERANCE
    return ours.dtype == eager.dtype and torch.allclose(ours.float(), eager.float(), rtol=step, atol=step)


@lru_cache(maxsize=16)
@torch.no_grad()
def disagreements(device: torch.device) -> tuple[str, ...]:
    """One reason, that these kernels give other numbers than PyTorch on this GPU or fail; empty when all agree."""
    try:
        wrong = [name for name, ours, eager in _pairs(device) if not _equal(ours, eager)]
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernels, and must not be kept as their answer
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver says is the reason
        wrong = [(str(error).strip().splitlines() or [type(error).__name__])[0][:120]]
    if not wrong:
        return ()
    reason = f"our elementwise kernels do not give PyTorch's numbers on this GPU ({', '.join(wrong)})"
    logger.warning("%s: PyTorch's own serve instead. Please report it.", reason[0].upper() + reason[1:])
    return (reason,)
