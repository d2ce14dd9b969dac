"""One attention call as data: its tensors, checked once, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import InputError

__all__ = ["Inputs", "Order", "scale_or_default"]

Order = Literal["BLHD", "BHLD"]


def scale_or_default(softmax_scale: float | None, head_dim: int) -> float:
    """The softmax scale that a call asks for: its own, or head_dim ** -0.5 (arXiv 1706.03762, section 3.2.1)."""
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


@dataclass(frozen=True)
class Inputs:
    """softmax(q k^T * scale + mask) v. `Inputs.checked` makes one whose parts fit together.

    Attributes:
        q: [B, Lq, H, D]. k, v: [B, Lk, H, D], or with `order` "BHLD" the axes L and H the other way round.
        attn_mask: broadcastable to [B, H, Lq, Lk]: bool (True takes part) or floating point (added to the scores).
        softmax_scale: None for D ** -0.5.
        causal: query i sees key j only where j <= i.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_mask: torch.Tensor | None = None
    softmax_scale: float | None = None
    causal: bool = False
    order: Order = "BLHD"

    @staticmethod
    def checked(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Inputs:
        """The call, or InputError where shapes, dtypes or devices do not fit together. Reads host data only."""
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
            raise InputError(f"attention takes q, k, v of [B, L, H, D], not {q.ndim}, {k.ndim} and {v.ndim} dimensions")
        if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or k.shape != v.shape:
            raise InputError(
                "attention takes q [B, Lq, H, D] and k, v [B, Lk, H, D], "
                f"not {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if k.dtype != q.dtype or v.dtype != q.dtype:
            raise InputError(f"attention takes q, k, v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
        if k.device != q.device or v.device != q.device:
            raise InputError(f"attention takes q, k, v on one device, not {q.device}, {k.device} and {v.device}")
        if k.shape[1] == 0:
            raise InputError("attention needs at least one key, k and v are empty")
        if softmax_scale is not None and not (math.isfinite(softmax_scale) and softmax_scale > 0):
            raise InputError(f"softmax_scale must be a finite number above 0, not {softmax_scale}")
        if attn_mask is not None:
            _check_mask(attn_mask, q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        return Inputs(q, k, v, attn_mask, softmax_scale, causal)

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return scale_or_default(self.softmax_scale, self.head_dim)

    @property
    def queries(self) -> int:
        return self.q.shape[self.order.index("L")]

    @property
    def keys(self) -> int:
        return self.k.shape[self.order.index("L")]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]


def _check_mask(mask: torch.Tensor, q: torch.Tensor, scores: tuple[int, int, int, int]) -> None:
    fits = mask.ndim <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise InputError(f"attn_mask {tuple(mask.shape)} does not broadcast to {scores}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"attn_mask must be bool or floating point, not {mask.dtype}")
    if mask.device != q.device:
        raise InputError(f"attention takes all tensors on one device, not q on {q.device}, attn_mask on {mask.device}")
