"""Linear layers with NVFP4 weights: e2m1 values, one e4m3 scale per 16 of them, one float32 scale per tensor.

weight[n, k] = e2m1[n, k] * weight_scale[n, k // 16] * weight_scale_2

The storage is that of comfy-kitchen and of ComfyUI's own files: `weight` uint8 with two values per byte (the first in
the high half), `weight_scale` e4m3 in the tiled order that cuBLAS reads, rows and columns padded to multiples of 16.
GPUs with FP4 tensor cores (Blackwell) multiply it as it is, with activations quantized the same way per call; others
unpack it.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ..kernels import contract
from ..kernels.contract import Contract, Described, Device, Operand, Size
from ..kernels.layout import aligned_contiguous
from ..kernels.selftest import device_reasons
from .base import QuantizedLinear, store_buffers, store_weight, take_over

__all__ = ["NVFP4Linear", "dequantize_nvfp4", "nvfp4_matmul_reasons", "nvfp4_storage_shapes", "quantize_nvfp4"]

E2M1_MAX = 6.0
E4M3_MAX = 448.0
BLOCK = 16
"""Values that share one scale."""

NVFP4_MATMUL = Contract(
    "comfy_kitchen.scaled_mm_nvfp4",
    Device(min_capability=(10, 0), purpose="for FP4 tensor cores"),
    (Operand("input", "M K", (torch.bfloat16, torch.float16)),),
    {
        "K": Size("there are {} input features", multiple_of=32),
        "N": Size("there are {} output features", multiple_of=16),
    },
)


def quantize_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] float -> (packed uint8 [M', K'/2], block scales e4m3 tiled, per-tensor scale float32 []).

    M' and K' are M and K rounded up to multiples of 16. The per-tensor scale lets the largest block scale use the whole
    e4m3 range (NVIDIA, "Introducing NVFP4"): max|x| / (6 * 448).
    """
    import comfy_kitchen

    x = aligned_contiguous(x)
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=torch.float32)
    # Divided by a tensor, not by a number, which CUDA turns into a product: so both devices store the same weight.
    scale = (largest / torch.full_like(largest, E2M1_MAX * E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    with _backend_for(x.dtype, x.device):
        packed, block_scales = comfy_kitchen.quantize_nvfp4(x, scale, pad_16x=True)
    return packed, block_scales, scale


def dequantize_nvfp4(packed: Tensor, block_scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [M', K'] in `dtype` of what `quantize_nvfp4` stored, padding included."""
    import comfy_kitchen

    # comfy-kitchen's plain-torch path multiplies the scales in the output dtype, which costs bfloat16 a systematic
    # 2^-9; its CUDA kernel multiplies in float32.
    unpacked = dtype if packed.is_cuda else torch.float32
    packed, block_scales = aligned_contiguous(packed), aligned_contiguous(block_scales)
    with _backend_for(unpacked, packed.device):
        return comfy_kitchen.dequantize_nvfp4(packed, scale.float(), block_scales, unpacked).to(dtype)


def _backend_for(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """comfy-kitchen's own choice, but its plain-torch path for float32 on a GPU, which its CUDA kernels reject."""
    import comfy_kitchen

    if device.type == "cuda" and dtype == torch.float32:
        return comfy_kitchen.use_backend("eager")
    return contextlib.nullcontext()


def nvfp4_storage_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of (packed weight, tiled block scales) of a weight [out_features, in_features]."""
    rows, columns = _round_up(out_features, 16), _round_up(in_features, 16)
    return (rows, columns // 2), (_round_up(rows, 128), _round_up(columns // BLOCK, 4))


def nvfp4_matmul_reasons(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, rows: int = 1
) -> list[str]:
    """Every reason why the FP4 matmul of comfy-kitchen cannot compute a linear layer; empty when it can."""
    return [*_weight_reasons(out_features, in_features, dtype, device), *(() if rows else ("there are no rows",))]


@torch.compiler.assume_constant_result
def _weight_reasons(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    found = contract.reasons(NVFP4_MATMUL, (Described(dtype, (1, k), device),), N=n)
    return tuple(dict.fromkeys((*found, *device_reasons(NVFP4_MATMUL.device, device))))


class NVFP4Linear(QuantizedLinear):
    """A linear layer with an NVFP4 weight; keys `weight`, `weight_scale`, `weight_scale_2`, `bias`."""

    weight_scale: Tensor
    weight_scale_2: Tensor

    @staticmethod
    def quantize(linear: nn.Linear, base_dtype: torch.dtype) -> NVFP4Linear:
        """Quantize the 16- or 32-bit weight of `linear` in place."""
        packed, block_scales, scale = quantize_nvfp4(linear.weight.detach().float())
        layer = take_over(linear, NVFP4Linear, base_dtype)
        store_weight(layer, packed)
        store_buffers(layer, weight_scale=block_scales, weight_scale_2=scale)
        return layer

    def dequantized_weight(self) -> Tensor:
        padded = dequantize_nvfp4(self.weight.detach(), self.weight_scale, self.weight_scale_2, self.base_dtype)
        return padded[: self.out_features, : self.in_features]

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features] in `base_dtype`, contiguous."""
        x = aligned_contiguous(input)
        leading = [int(n) for n in x.shape[:-1]]
        rows = x.reshape(-1, self.in_features)
        if nvfp4_matmul_reasons(self.out_features, self.in_features, self.base_dtype, x.device, rows.shape[0]):
            return super().forward(x)
        return self._native(rows).reshape(*leading, self.out_features)

    def _native(self, rows: Tensor) -> Tensor:
        """rows [M, K] -> [M, N] by the FP4 tensor cores: the activations are quantized to NVFP4 too."""
        import comfy_kitchen

        packed, block_scales, scale = quantize_nvfp4(rows.to(self.base_dtype))
        padded = comfy_kitchen.scaled_mm_nvfp4(
            packed,
            aligned_contiguous(self.weight.detach()),
            scale,
            self.weight_scale_2.float(),
            block_scales,
            aligned_contiguous(self.weight_scale),
            bias=None if self.bias is None else self.bias.detach().to(self.base_dtype),
            out_dtype=self.base_dtype,
        )
        return aligned_contiguous(padded[: rows.shape[0]])


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
