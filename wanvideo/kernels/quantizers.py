"""Reference quantizers: what a low-precision kernel must produce, bit for bit, in plain torch.

NVFP4 is the format of Blackwell's FP4 tensor cores (NVIDIA, "Introducing NVFP4"): e2m1 values, one e4m3 scale per 16 of
them, one float32 scale above. All divisions are IEEE divisions in float32 and all roundings are to nearest, ties to
even, so that a kernel that does the same is bit-equal. An e2m1 x e4m3 product needs six significant bits, so values
times block scale are exact in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "INT8_MAX",
    "NVFP4",
    "NVFP4_BLOCK",
    "e4m3_scaled",
    "int8_scaled",
    "nvfp4_tensor_scale",
    "pack_e2m1",
    "power_of_two_from",
    "quantize_nvfp4",
    "round_to_e2m1",
    "unpack_e2m1",
]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 stand for; codes 8 to 15 are their negatives."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
INT8_MAX = 127.0
NVFP4_BLOCK = 16
"""Values that share one e4m3 scale."""

_TINY = torch.finfo(torch.float32).tiny


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The e2m1 value nearest to each element, ties to the even code, saturating at 6; float32, like `x` in shape.

    NaN stays NaN: e2m1 has none, and a quantizer that turns it into a number hides a fault.
    """
    x = x.float()
    size = x.abs()
    fine = torch.round(size * 2) / 2  # steps of 1/2 below 2
    middle = torch.round(size)  # steps of 1 from 2 to 4
    coarse = torch.round(size / 2) * 2  # steps of 2 above
    rounded = torch.where(size < 2, fine, torch.where(size < 4, middle, coarse))
    return torch.copysign(rounded.clamp(max=E2M1_MAX), x)


def _code_of(values: torch.Tensor) -> torch.Tensor:
    """The 4-bit code (uint8) of values on the e2m1 grid: bits of the e4m3 number that is 64 times smaller."""
    bits = (values.float() / 64).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits >> 4 & 8 | bits >> 2 & 7


def pack_e2m1(values: torch.Tensor, first_in_high_half: bool = True) -> torch.Tensor:
    """Values on the e2m1 grid [..., n] -> uint8 [..., n / 2], two codes per byte."""
    codes = _code_of(values)
    first, second = codes[..., ::2], codes[..., 1::2]
    return (first << 4 | second) if first_in_high_half else (second << 4 | first)


def unpack_e2m1(packed: torch.Tensor, first_in_high_half: bool = True) -> torch.Tensor:
    """uint8 [..., n / 2] -> the float32 values [..., n]; undoes `pack_e2m1`."""
    high, low = packed >> 4, packed & 15
    codes = torch.stack((high, low) if first_in_high_half else (low, high), dim=-1).flatten(-2)
    return ((codes & 8) << 4 | (codes & 7) << 2).view(torch.float8_e4m3fn).float() * 64


@dataclass(frozen=True)
class NVFP4:
    """A tensor in NVFP4: x ~ values * block_scales (each for 16 values of the last dimension) * tensor_scale.

    Attributes:
        values: float32 on the e2m1 grid, [..., n], n a multiple of 16 (padded with zeros).
        block_scales: float8_e4m3fn, [..., n / 16].
        tensor_scale: float32, broadcastable to [..., 1].
    """

    values: torch.Tensor
    block_scales: torch.Tensor
    tensor_scale: torch.Tensor

    def operand(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """values * block_scales: exact in bfloat16. What a matrix product multiplies before the outer scale."""
        scales = self.block_scales.float().repeat_interleave(NVFP4_BLOCK, dim=-1)
        return (self.values * scales).to(dtype)

    def dequantized(self) -> torch.Tensor:
        """The float32 tensor that the format stands for, padding included."""
        return self.operand() * self.tensor_scale


def power_of_two_from(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two >= each positive float32 value (at most 2 ** 127); NaN and infinity stay.

    By the bits, since pow and exp2 of a GPU need not be exact.
    """
    bits = x.float().view(torch.int32)
    rounded_up = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32).clamp(max=2.0**127)
    return torch.where(x.isfinite(), rounded_up, x.float())


def nvfp4_tensor_scale(x: torch.Tensor, dims: tuple[int, ...], power_of_two: bool = True) -> torch.Tensor:
    """The outer scale that brings max|x| over `dims` (kept, size 1) to the largest NVFP4 value, 6 * 448.

    As a power of two (rounded up) it only moves exponents: tensors of ordinary size quantize to the same e2m1 values
    as without it, and large or small ones neither saturate nor vanish.
    """
    # A maximum of NaN is NaN: the scale, and with it the output, then says so.
    scale = x.float().abs().amax(dims, keepdim=True) / (E2M1_MAX * E4M3_MAX)
    scale = scale.clamp_min(_TINY)
    if not power_of_two:
        return scale
    return power_of_two_from(scale)


def quantize_nvfp4(x: torch.Tensor, tensor_scale: torch.Tensor | float = 1.0) -> NVFP4:
    """Quantize the last dimension of `x` in blocks of 16, each scaled by e4m3(max|block| / 6 / tensor_scale).

    Args:
        x: floating point [..., n]; padded with zeros to a multiple of 16.
        tensor_scale: the outer float32 scale, broadcastable to [..., 1] (`nvfp4_tensor_scale`).
    """
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % NVFP4_BLOCK))
    outer = torch.as_tensor(tensor_scale, dtype=torch.float32, device=x.device)
    blocks = x.unflatten(-1, (-1, NVFP4_BLOCK))  # [..., n / 16, 16]
    # Divided by a tensor, not by a number, which CUDA turns into a product.
    wanted = blocks.abs().amax(-1) / torch.full_like(outer, E2M1_MAX) / outer
    scales = wanted.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    total = (outer * scales.float()).unsqueeze(-1)
    # A block whose scale rounds to zero holds zeros.
    values = torch.where(total == 0, torch.zeros_like(blocks), blocks / torch.where(total == 0, 1.0, total))
    return NVFP4(round_to_e2m1(values).flatten(-2), scales, outer)


def int8_scaled(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ values * scale with integers in -127..127 (as float32) and scale = max|x| over `dims` / 127."""
    x = x.float()
    scale = (x.abs().amax(dims, keepdim=True) / INT8_MAX).clamp_min(_TINY)
    return torch.round(x / scale), scale


def e4m3_scaled(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ values * scale with values on the e4m3 grid (as float32) and scale = max|x| over `dims` / 448."""
    x = x.float()
    scale = (x.abs().amax(dims, keepdim=True) / E4M3_MAX).clamp_min(_TINY)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float(), scale
