"""Calls of the elementwise groups, what they should give in float64, and how far off one rounding may be.

The measure by which a form may take the place of an eager one; tests and the benchmark read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from wanvideo_infinitetalk.wanvideo.kernels import fused
from wanvideo_infinitetalk.wanvideo.kernels.rope import Rotation
from wanvideo_infinitetalk.wanvideo.kernels.selftest import eager_reasons
from wanvideo_infinitetalk.wanvideo.modules import elementwise

__all__ = ["GROUPS", "KINDS", "SLACK", "Call", "calls", "exact", "excess", "only_eager", "why_eager"]

GROUPS = {
    contract.kernel: contract
    for contract in (
        fused.MODULATED_NORM,
        fused.AFFINE_NORM,
        fused.RMS_NORM,
        fused.QK_NORM_ROPE,
        fused.GATED_RESIDUAL,
        fused.ADD_MODULATED_NORM,
        fused.ADD_AFFINE_NORM,
    )
}
"""Group -> the contract of its kernel."""

Call = tuple[Any, ...]
"""Arguments of one group."""

KINDS = ("normal", "outlier channels", "large mean", "large", "constant rows", "zeros")
"""Values that are hard to sum."""

EPS = 1e-6


def why_eager(group: str, call: Call) -> Sequence[str]:
    """Every reason why the eager form computes a call; empty when the kernel does."""
    flat = [x for part in call for x in (part if isinstance(part, tuple) else (part,))]
    tensors: list[Tensor | None] = [x for x in flat if isinstance(x, Tensor)]
    if group == "add_affine_norm":
        tensors.insert(2, None)  # its gate is a number
    given = {"heads": call[5]} if group == "qk_norm_rope" else {}
    return eager_reasons(GROUPS[group], tensors, **given)


@contextlib.contextmanager
def only_eager() -> Iterator[None]:
    """Inside the `with` block every group is computed by its eager form."""
    before = elementwise.eager_reasons
    elementwise.eager_reasons = lambda *_, **__: ("asked for",)
    try:
        yield
    finally:
        elementwise.eager_reasons = before


def _rows(shape: tuple[int, ...], kind: str, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device)
    if kind == "outlier channels":
        x[..., ::17] *= 100
    elif kind == "large mean":
        x += 30
    elif kind == "large":
        x *= 1e3
    elif kind == "constant rows":
        x = x[..., :1].expand(shape).clone()
    elif kind == "zeros":
        x = torch.zeros(shape, device=device)
    return x


def calls(
    batch: int, length: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, kind: str
) -> dict[str, Call]:
    """group -> arguments, laid out as the model gives them (modulation as slices of one tensor)."""
    width = heads * head_dim
    x, y = (_rows((batch, length, width), kind, device).to(dtype) for _ in range(2))
    angles = 6.3 * torch.rand(length, 1, head_dim // 2, device=device)
    rotation = Rotation(angles.cos(), angles.sin())
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    shift, scale, gate = torch.randn(batch, 6, width, device=device).split(1, dim=1)[:3]
    return {
        "modulated_norm": (x, shift, scale, EPS),
        "affine_norm": (x, weight, bias, EPS),
        "rms_norm": (x, weight, EPS),
        "qk_norm_rope": (x, y, weight, bias, rotation, heads, EPS),
        "gated_residual": (x, y, gate),
        "add_modulated_norm": (x, y, gate, shift, scale, EPS),
        "add_affine_norm": (x, y, 0.7, weight, bias, EPS),
    }


SLACK = 2.0**-18
"""Of the sum of all magnitudes in a result: what float32 arithmetic and another order of sums may add before the
rounding (float32 keeps 24 bits; a sum over a row in any order costs a few of them)."""


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def exact(group: str, call: Call) -> list[tuple[Tensor, Tensor]]:
    """For each result: (its value, the sum of the magnitudes that it is made of), both float64."""
    if group in ("add_modulated_norm", "add_affine_norm"):
        x, branch, gate, *_ = call
        added = (gate.double() if isinstance(gate, Tensor) else gate) * branch.double()
        return [(x.double() + added, x.double().abs() + added.abs())]  # what is normed is the rounded sum: see `excess`
    if group in ("modulated_norm", "affine_norm"):
        x, first, second, eps = call
        shift, factor = (first, 1 + second.double()) if group == "modulated_norm" else (second, first.double())
        x = x.double()
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
        # The mean is subtracted: its own rounding counts in units of what it is subtracted from.
        spread = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + eps) * x.abs().amax(-1, keepdim=True)
        size = (normed.abs() + spread) * factor.abs() + shift.double().abs()
        return [(normed * factor + shift.double(), size)]
    if group == "rms_norm":
        out = _rms(*call)
        return [(out, out.abs())]
    if group == "qk_norm_rope":
        q, k, q_weight, k_weight, rotation, heads, eps = call
        results = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            a, b = _rms(x, weight, eps).unflatten(-1, (heads, -1, 2)).unbind(-1)
            cos, sin = (t.double() for t in rotation)
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
            size = torch.stack([(a * cos).abs() + (b * sin).abs(), (a * sin).abs() + (b * cos).abs()], -1).flatten(-2)
            results.append((turned, size))
        return results
    x, branch, gate = (t.double() for t in call)
    return [(x + gate * branch, x.abs() + (gate * branch).abs())]


def excess(group: str, result: Any, call: Call) -> float:
    """The largest error over what one rounding to the result's dtype and float32 arithmetic allow; at most 1 is right.

    One rounding errs by at most half a unit in the last place, that is 2^-9 of the value in bf16 and 2^-12 in fp16 (of
    the power of two above it).
    """
    results = result if isinstance(result, tuple) else (result,)
    worst = 0.0
    if group.startswith("add_"):
        sums, normed = results
        worst = excess(group.removeprefix("add_"), normed, (sums, *call[3:]))
        results = (sums,)
    for got, (wanted, size) in zip(results, exact(group, call), strict=True):
        if not bool(torch.isfinite(got).all()):
            return float("inf")
        info = torch.finfo(got.dtype)
        _, exponent = torch.frexp(wanted.abs() + SLACK * size)  # value < 2 ** exponent
        half_ulp = info.eps / 4 * torch.exp2(exponent.double())
        allowed = half_ulp.clamp_min(info.tiny * info.eps / 2) + SLACK * size
        worst = max(worst, float(((got.double() - wanted).abs() / allowed).max()))
    return worst
