"""How exact each mode and backend is on generated cases, and which backend a mode runs for a case."""

from __future__ import annotations

import torch
from wanvideo_infinitetalk.wanvideo.kernels.emulation import int8_fp8_attention, nvfp4_attention
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.modules.attention import MODE_BACKENDS
from wanvideo_infinitetalk.wanvideo.modules.backends import RUNTIME, lookup
from wanvideo_infinitetalk.wanvideo.modules.backends.contract import EIGHT_BIT, FOUR_BIT

from support.attention_cases import DTYPES, Case, reference, relative_error


def bound_of(name: str, case: Case) -> float:
    """Relative L2 of a mode or a backend on a case: that of the least exact backend that it may run."""
    # Which kernel "auto" takes is not known before; it takes none of 4 bits.
    names = ("triton_fp8",) if name == "auto" else MODE_BACKENDS.get(name, (name,))
    return max(lookup(backend).bound[DTYPES[case.dtype]] for backend in names)


NUMERICS = {EIGHT_BIT[torch.float32]: int8_fp8_attention, FOUR_BIT[torch.float32]: nvfp4_attention}
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


def backend_of(name: str, one: Case, qkv: tuple[torch.Tensor, ...]) -> str | None:
    """The backend that a mode runs for a case, None when none can."""
    inputs = Inputs.checked(*qkv, softmax_scale=one.scale)
    for backend in map(lookup, MODE_BACKENDS.get(name, (name,))):
        if not RUNTIME.reasons(backend, inputs):
            return backend.name
    return None
