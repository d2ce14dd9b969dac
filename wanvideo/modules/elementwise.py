"""The elementwise groups of a transformer block, each as one function (and the two norms that carry weights).

Each group has two forms with the same arguments: the eager one, which is the reference, and our Triton kernel. Both
compute in float32, round once to the dtype of their first argument, and write to none of their arguments. `PREFERRED`
says which form serves a group; where it cannot, in a compiled graph (which fuses the eager form itself) and under
autograd, the eager one does.

comfy-kitchen's `adaln` is no form of ours: it reads scale and shift in x's dtype whatever theirs is, so that the
float32 modulation of a bf16 model gives numbers of 1e29 without an error. `python -m benchmarks.fused` times it on a
rounded copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import fused as own
from ..kernels import reference
from ..kernels.rope import Rotation

__all__ = [
    "FORMS",
    "PREFERRED",
    "AffineNorm",
    "Form",
    "GeluTanh",
    "RMSNorm",
    "affine_norm",
    "gated_residual",
    "gelu_tanh",
    "modulated_norm",
    "preferring",
    "qk_norm_rope",
    "rms_norm",
]

EAGER, OWN = "eager", "own"


# ---------------------------------------------------------------------------------------------------------- the choice


class Form(NamedTuple):
    """One way to compute a group: the function, and whether it serves a call of these arguments, by host data only."""

    run: Callable[..., Any]
    serves: Callable[..., bool]


def _always(*call: Any) -> bool:
    return True


FORMS: dict[str, dict[str, Form]] = {
    "modulated_norm": {
        EAGER: Form(reference.modulated_norm, _always),
        OWN: Form(own.modulated_norm, own.serves_modulated_norm),
    },
    "affine_norm": {
        EAGER: Form(reference.affine_norm, _always),
        OWN: Form(own.affine_norm, own.serves_affine_norm),
    },
    "rms_norm": {
        EAGER: Form(reference.rms_norm, _always),
        OWN: Form(own.rms_norm, own.serves_rms_norm),
    },
    "qk_norm_rope": {
        EAGER: Form(reference.qk_norm_rope, _always),
        OWN: Form(own.qk_norm_rope, own.serves_qk_norm_rope),
    },
    "gated_residual": {
        EAGER: Form(reference.gated_residual, _always),
        OWN: Form(own.gated_residual, own.serves_gated_residual),
    },
}
"""Group -> form -> how it is computed."""

PREFERRED: dict[str, str] = dict.fromkeys(FORMS, OWN)
"""Group -> the form that serves it. Another than the eager one stands here only when `python -m benchmarks.fused` found
it faster and no further from float64 than one rounding allows: docs/kernels.md has the figures."""


@contextlib.contextmanager
def preferring(**forms: str) -> Iterator[None]:
    """For measurements and tests: inside the `with` block these groups are served by these forms."""
    before = dict(PREFERRED)
    unknown = [f"{group}={form}" for group, form in forms.items() if form not in FORMS.get(group, {})]
    if unknown:
        raise ValueError(f"there is no such form: {', '.join(unknown)}")
    PREFERRED.update(forms)
    try:
        yield
    finally:
        PREFERRED.update(before)


def _run(group: str, *call: Any) -> Any:
    forms = FORMS[group]
    if not torch.compiler.is_compiling() and PREFERRED[group] != EAGER and not _differentiated(call):
        chosen = forms[PREFERRED[group]]
        if chosen.serves(*call):
            return chosen.run(*call)
    return forms[EAGER].run(*call)


def _differentiated(call: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in call)


# ---------------------------------------------------------------------------------------------------------- the groups


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without weights, then `* (1 + scale) + shift` (adaLN, arXiv 2212.09748, section 3.2).

    Args:
        x: [B, L, C].
        shift, scale: [B, 1, C] float32.
        eps: added to the variance.
    """
    out: torch.Tensor = _run("modulated_norm", x, shift, scale, eps)
    return out


def affine_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the last axis with weight and bias [C] of any float dtype. x [..., C]."""
    out: torch.Tensor = _run("affine_norm", x, weight, bias, eps)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467). x [..., C], weight [C]."""
    out: torch.Tensor = _run("rms_norm", x, weight, eps)
    return out


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rotation: Rotation,
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of q and k over all channels together, split into heads, rotary embedding.

    Args:
        q, k: [B, L, C].
        q_weight, k_weight: [C].
        rotation: cos and sin, each [L, 1, D/2] with D = C / num_heads.

    Returns:
        q and k, each [B, L, H, D], contiguous.
    """
    out: tuple[torch.Tensor, torch.Tensor] = _run("qk_norm_rope", q, k, q_weight, k_weight, rotation, num_heads, eps)
    return out


def gated_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * branch. x, branch [B, L, C]; gate [B, 1, C] float32 (the sum is promoted to it)."""
    out: torch.Tensor = _run("gated_residual", x, branch, gate)
    return out


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation (arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


class AffineNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, computed in float32 whatever their dtype. [..., C] -> [..., C]"""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return affine_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMS norm with a weight, computed in float32 whatever its dtype. [..., C] -> [..., C]"""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GeluTanh(nn.Module):
    """`gelu_tanh` as a layer of a Sequential."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)
