"""Linear layers with NVFP4 weights: e2m1 values, one e4m3 scale per 16 of them, one float32 scale per tensor.

weight[n, k] = e2m1[n, k] * weight_scale[n, k // 16] * weight_scale_2

The storage is that of comfy-kitchen and of ComfyUI's own files: `weight` uint8 with two values per byte (the first in
the high half), `weight_scale` e4m3 in the tiled order that cuBLAS reads, rows and columns padded to multiples of 16.
Everything here runs in plain torch: the weight is unpacked, then multiplied. Where comfy-kitchen is installed, its CUDA
kernels pack and unpack, and GPUs with FP4 tensor cores (Blackwell) multiply the weight as it is stored, with
activations quantized the same way per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import torch
import torch.nn.functional as F
from einops import rearrange
from packaging.version import Version
from torch import Tensor, nn

from ..kernels import contract, quantizers
from ..kernels.contract import Contract, Described, Device, Operand, Package, Size
from ..kernels.layout import aligned_contiguous
from ..kernels.quantizers import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK
from ..kernels.selftest import device_reasons
from .base import QuantizedLinear, store_buffers, store_weight, take_over

__all__ = [
    "NVFP4Linear",
    "dequantize_nvfp4",
    "nvfp4_matmul_reasons",
    "nvfp4_storage_shapes",
    "quantize_nvfp4",
    "tile_padded",
    "tiled",
    "untiled",
]

PADDING = 16
"""Rows and columns of a stored weight are a multiple of this."""

SCALE_TILE = (128, 4)
"""cuBLAS reads block scales in tiles of so many rows and columns."""

OLDEST_KITCHEN = "0.2.30"
"""Older releases of comfy-kitchen are left alone."""

NVFP4_MATMUL = Contract(
    "comfy_kitchen.scaled_mm_nvfp4",
    Device(
        min_capability=(10, 0),
        purpose="for FP4 tensor cores",
        package=Package("comfy-kitchen", f">={OLDEST_KITCHEN}", "comfy_kitchen", ("scaled_mm_nvfp4",)),
    ),
    (Operand("input", "M K", (torch.bfloat16, torch.float16)),),
    {
        "K": Size("there are {} input features", multiple_of=32),
        "N": Size("there are {} output features", multiple_of=16),
    },
)


def _kitchen_installed() -> bool:
    try:
        return Version(metadata.version("comfy-kitchen")) >= Version(OLDEST_KITCHEN)
    except metadata.PackageNotFoundError:
        return False


KITCHEN = _kitchen_installed()
"""Whether comfy-kitchen's kernels can be used."""


def _kitchen_packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether comfy-kitchen's CUDA kernels pack or unpack values of `dtype`; they take 16 bits."""
    return KITCHEN and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def quantize_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] float -> (packed uint8 [M', K'/2], block scales e4m3 tiled, per-tensor scale float32 []).

    M' and K' are M and K rounded up to multiples of 16. The per-tensor scale lets the largest block scale use the whole
    e4m3 range (NVIDIA, "Introducing NVFP4"): max|x| / (6 * 448).
    """
    x = aligned_contiguous(x)
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=torch.float32)
    # Divided by a tensor, not by a number, which CUDA turns into a product: so both devices store the same weight.
    scale = (largest / torch.full_like(largest, E2M1_MAX * E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    if _kitchen_packs(x.dtype, x.device):
        import comfy_kitchen

        return *comfy_kitchen.quantize_nvfp4(x, scale, pad_16x=True), scale
    quantized = quantizers.quantize_nvfp4(F.pad(x, (0, -x.shape[1] % PADDING, 0, -x.shape[0] % PADDING)), scale)
    return quantizers.pack_e2m1(quantized.values), tiled(quantized.block_scales), scale


def dequantize_nvfp4(packed: Tensor, block_scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [M', K'] of what `quantize_nvfp4` stored, padding included: float32 products, rounded to `dtype`."""
    packed, block_scales = aligned_contiguous(packed), aligned_contiguous(block_scales)
    if _kitchen_packs(dtype, packed.device):
        import comfy_kitchen

        values: Tensor = comfy_kitchen.dequantize_nvfp4(packed, scale.float(), block_scales, dtype)
        return values
    blocks: Tensor = quantizers.unpack_e2m1(packed).unflatten(-1, (-1, NVFP4_BLOCK))
    scales = scale.float() * untiled(block_scales, blocks.shape[0], blocks.shape[1]).float()
    return (blocks * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def tiled(scales: Tensor) -> Tensor:
    """Block scales [rows, columns] in cuBLAS's order, padded with zeros to whole tiles.

    Tiles of 128 x 4 lie one after the other, row by row; in a tile row 32 i + j is the i-th group of four of line j
    (cuBLAS, "1D Block Scaling Factors Layout").
    """
    rows, columns = scales.shape
    whole = tile_padded(rows, columns)
    padded = F.pad(scales.view(torch.uint8), (0, whole[1] - columns, 0, whole[0] - rows))
    lines = rearrange(padded, "(r i j) (c s) -> (r c j i s)", i=4, j=32, s=4)
    return lines.view(scales.dtype).reshape(padded.shape)


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `tiled`: [rows, columns] without the padding, of one-byte block scales of any dtype."""
    across = -(-columns // SCALE_TILE[1])
    lines = scales.view(torch.uint8).flatten()
    table = rearrange(lines, "(r c j i s) -> (r i j) (c s)", c=across, i=4, j=32, s=4)
    return table[:rows, :columns].view(scales.dtype)


def nvfp4_storage_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of (packed weight, tiled block scales) of a weight [out_features, in_features]."""
    rows, columns = _round_up(out_features, PADDING), _round_up(in_features, PADDING)
    return (rows, columns // 2), tile_padded(rows, columns // NVFP4_BLOCK)


def tile_padded(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of block scales in cuBLAS's order: whole tiles."""
    return _round_up(rows, SCALE_TILE[0]), _round_up(columns, SCALE_TILE[1])


def nvfp4_matmul_reasons(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, rows: int = 1
) -> list[str]:
    """Every reason why the FP4 matmul of comfy-kitchen cannot compute a linear layer; empty when it can."""
    return [*_weight_reasons(out_features, in_features, dtype, device), *(() if rows else ("there are no rows",))]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _weight_reasons(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    found = contract.reasons(NVFP4_MATMUL, (Described(dtype, (1, k), device),), N=n)
    return tuple(dict.fromkeys((*found, *device_reasons(NVFP4_MATMUL.device, device))))


class NVFP4Linear(QuantizedLinear):
    """A linear layer with an NVFP4 weight; keys `weight`, `weight_scale`, `weight_scale_2`, `bias`."""

    fast_way = "the FP4 matmul"
    weight_scale: Tensor
    weight_scale_2: Tensor

    def unpacked_reasons(self, device: torch.device) -> Sequence[str]:
        found = nvfp4_matmul_reasons(self.out_features, self.in_features, self.base_dtype, device)
        return [*super().unpacked_reasons(device), *found]

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
        if self.full_precision or nvfp4_matmul_reasons(
            self.out_features, self.in_features, self.base_dtype, x.device, rows.shape[0]
        ):
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
