"""How exact each mode and backend is on generated cases, and which backend serves a case."""

from __future__ import annotations

import torch
from wanvideo_infinitetalk.wanvideo.kernels.emulation import int8_fp8_attention, nvfp4_attention
from wanvideo_infinitetalk.wanvideo.modules.attention import MODE_BACKENDS
from wanvideo_infinitetalk.wanvideo.modules.backends import lookup, not_supported_reasons, unavailable_reasons

from support.attention_cases import Case, reference, relative_error

# Relative L2 against float64 on the hardest input, white noise. 16-bit rounding for exact kernels; for the others what
# their number format costs (tests/unit/test_emulation.py), with a margin for the smallest sizes.
EXACT = {"bf16": 0.01, "fp16": 0.003, "fp32": 1e-4}
EIGHT_BIT, FOUR_BIT = 0.06, 0.26
BOUNDS = {
    "sdpa": EXACT,
    "auto": EIGHT_BIT,
    "eager": EXACT,
    "flash_attn_2": {**EXACT, "fp32": 0.01},
    "flash_attn_3": {**EXACT, "fp32": 0.01},
    "sageattn": EIGHT_BIT,
    "sageattn_3_fp8": EIGHT_BIT,
    "comfy_kitchen_int8": EIGHT_BIT,
    "sageattn_3": FOUR_BIT,
    "sageattn_3_fp4": FOUR_BIT,
    "emulated_fp8": EIGHT_BIT,
    "emulated_nvfp4": FOUR_BIT,
    "emulated_nvfp4_plain": FOUR_BIT,
}


def bound_of(name: str, case: Case) -> float:
    """Relative L2 of a mode or a backend on a case."""
    bound = BOUNDS[name]
    return bound[case.dtype] if isinstance(bound, dict) else bound


NUMERICS = {EIGHT_BIT: int8_fp8_attention, FOUR_BIT: nvfp4_attention}
"""Bound -> the number format that it is for, in plain torch."""
NO_WORSE = 1.25
"""Than plain torch, whose scales of Q and K cover other rows than a kernel's."""


def bound_on(name: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """`bound_of`, or what the number format itself costs on these inputs where that is more.

    Noise that is made of a handful of numbers rounds alike everywhere, and its errors do not cancel.
    """
    bound = bound_of(name, case)
    if bound not in NUMERICS:
        return bound
    plain = NUMERICS[bound](q, k, v, case.scale)
    return max(bound, NO_WORSE * relative_error(plain, reference(q, k, v, case.scale)))


def served_by(name: str, one: Case, qkv: tuple[torch.Tensor, ...]) -> str | None:
    """The backend that a mode runs for a case, None when none can."""
    for backend in map(lookup, MODE_BACKENDS.get(name, (name,))):
        if unavailable_reasons(backend.name, qkv[0].device):
            continue
        if not not_supported_reasons(backend.contract, *qkv, None, one.scale, False, layout=False):
            return backend.name
    return None
