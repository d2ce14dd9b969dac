"""The backends that exist everywhere: Triton kernels of FP8 and FP4 precision, and their numerics in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...kernels import sage_fp4, sage_fp8
from ...kernels._common import ATTENTION_DTYPES, TRITON
from ...kernels.emulation import int8_fp8_attention, nvfp4_attention
from ...kernels.inputs import Inputs
from ...kernels.selftest import native_fp4_reasons
from .contract import ANY_FLOAT, EIGHT_BIT, FOUR_BIT, HALF, Backend, Contract, Device

__all__ = ["EMULATED_FP8", "EMULATED_NVFP4", "EMULATED_NVFP4_PLAIN", "TRITON_FP4", "TRITON_FP8"]


def run_fp8(inputs: Inputs) -> torch.Tensor:
    """`sage_fp8`, int8 Q and K, e4m3 P and V."""
    return sage_fp8.run(inputs.q, inputs.k, inputs.v, inputs.scale)


def run_fp4(inputs: Inputs) -> torch.Tensor:
    """`sage_fp4`, on FP4 tensor cores where they are and the self-test found them right."""
    native = not native_fp4_reasons(inputs.q.device)
    return sage_fp4.run(inputs.q, inputs.k, inputs.v, inputs.scale, native)


# Both take strides in units of 16 bytes, so that one compiled kernel with wide loads covers every length and layout.
TRITON_FP8 = Backend(
    "triton_fp8",
    Contract(dtypes=ATTENTION_DTYPES, head_dim=sage_fp8.HEAD_DIM, device=TRITON),
    run_fp8,
    EIGHT_BIT,
    note="this project's int8/fp8 kernel",
)
TRITON_FP4 = Backend(
    "triton_fp4",
    Contract(dtypes=HALF, head_dim=sage_fp4.HEAD_DIM, device=TRITON),
    run_fp4,
    FOUR_BIT,
    note="this project's NVFP4 kernel",
)


def _emulated(name: str, bound: dict[torch.dtype, float], attend: Callable[..., torch.Tensor]) -> Backend:
    def run(inputs: Inputs) -> torch.Tensor:
        return attend(inputs.q, inputs.k, inputs.v, inputs.softmax_scale)

    contract = Contract(dtypes=ANY_FLOAT, layout="any", device=Device(types=()))
    return Backend(name, contract, run, bound, note="the same numerics in plain torch: right, not fast", emulation=True)


EMULATED_FP8 = _emulated("emulated_fp8", EIGHT_BIT, int8_fp8_attention)
EMULATED_NVFP4 = _emulated("emulated_nvfp4", FOUR_BIT, nvfp4_attention)
EMULATED_NVFP4_PLAIN = _emulated(
    "emulated_nvfp4_plain", FOUR_BIT, functools.partial(nvfp4_attention, block_means=False)
)
