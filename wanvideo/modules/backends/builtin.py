"""The modes that exist everywhere: our own kernels of FP8 and FP4 precision, and the same numerics in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...kernels.emulation import int8_fp8_attention, nvfp4_attention
from . import packages
from .contract import HALF, Contract
from .registry import Backend, Run, register

__all__ = ["EMULATED_FP8", "EMULATED_NVFP4", "EMULATED_NVFP4_PLAIN", "OWN_FP4", "OWN_FP8"]

# wanvideo.modules.backends.portable -> wanvideo.kernels
_KERNELS = __name__.rsplit(".", 3)[0] + ".kernels"

# Both take strides in units of 16 bytes, so that one compiled kernel with wide loads serves every length and layout.
OWN_FP8_CONTRACT = Contract(
    dtypes=(*HALF, torch.float32),
    layout="aligned_strided",
    head_dims=(64, 96, 128),
    min_capability=(8, 0),
)

OWN_FP4_CONTRACT = Contract(
    dtypes=HALF,
    layout="aligned_strided",
    head_dims=(64, 128),
    min_capability=(8, 0),
)


def _kernel_unavailable(module: str, device: torch.device) -> list[str]:
    """What the kernel module itself says; a module that cannot be imported (no Triton) says why."""
    if device.type != "cuda":
        return []  # the contract says so already
    try:
        return list(packages.load(f"{_KERNELS}.{module}").unavailable_reasons(device))
    except ImportError as error:
        return [f"it cannot be imported ({error})"]


def _run_kernel(module: str, function: str) -> Run:
    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        softmax_scale: float | None,
        causal: bool,
    ) -> torch.Tensor:
        kernel = getattr(packages.load(f"{_KERNELS}.{module}"), function)
        return kernel(q, k, v, softmax_scale=softmax_scale)

    return run


OWN_FP8 = register(
    Backend(
        "own_fp8",
        OWN_FP8_CONTRACT,
        _run_kernel("sage_fp8", "sage_fp8_attention"),
        functools.partial(_kernel_unavailable, "sage_fp8"),
        note="this project's int8/fp8 kernel",
    )
)
OWN_FP4 = register(
    Backend(
        "own_fp4",
        OWN_FP4_CONTRACT,
        _run_kernel("sage_fp4", "sage_fp4_attention"),
        functools.partial(_kernel_unavailable, "sage_fp4"),
        note="this project's NVFP4 kernel",
    )
)

EMULATED_CONTRACT = Contract(
    dtypes=(*HALF, torch.float32, torch.float64),
    layout="any",
    device_types=(),
)


def _emulated(attend: Callable[..., torch.Tensor]) -> Run:
    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        softmax_scale: float | None,
        causal: bool,
    ) -> torch.Tensor:
        return attend(q, k, v, softmax_scale)

    return run


_NOTE = "the same numerics in plain torch: right, not fast"
EMULATED_FP8 = register(Backend("emulated_fp8", EMULATED_CONTRACT, _emulated(int8_fp8_attention), note=_NOTE))
EMULATED_NVFP4 = register(Backend("emulated_nvfp4", EMULATED_CONTRACT, _emulated(nvfp4_attention), note=_NOTE))
EMULATED_NVFP4_PLAIN = register(
    Backend(
        "emulated_nvfp4_plain",
        EMULATED_CONTRACT,
        _emulated(functools.partial(nvfp4_attention, block_means=False)),
        note=_NOTE,
    )
)
