"""Activations quantized per row for an fp8 matmul, and scaling its product: one Triton kernel each.

Bit-equal to the eager forms in `reference.py`; each function has its contract in front. Any address is right: Triton
loads by the alignment it finds. Whether a kernel runs is chosen in `fp8_optimization`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._common import MAX_CHANNELS, MAX_ROWS, next_power_of_two, on_device_of
from .contract import Contract, Device, Operand, Size

__all__ = [
    "FP8",
    "QUANTIZE_ROWS",
    "SCALE_PRODUCT",
    "Activations",
    "QuantizedRows",
    "empty_rows",
    "quantize_rows",
    "rounds_first",
    "scale_product",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FP8 = Device(min_capability=(8, 9), purpose="Triton converts float32 to e4m3 there", triton=True)
"""Below it there is no fp8 matmul to quantize for either."""

CONVERTS_EXACTLY = (9, 0)
"""From here on every Triton converts float32 to e4m3 by one instruction that rounds once."""

COLUMNS = 1024
"""Of one program of `scale_product`."""


class QuantizedRows(NamedTuple):
    """Activations x [..., K] ~ values * scale: the input of fp8 matmuls, quantized once for all that read it."""

    values: torch.Tensor
    """e4m3fn [..., K], contiguous; 448 is the largest of each row."""
    scale: torch.Tensor
    """float32 [..., 1]."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def first(self, tokens: int) -> QuantizedRows:
        """The first tokens of [1, L, K], without a copy."""
        return QuantizedRows(self.values[:, :tokens], self.scale[:, :tokens])


Activations = torch.Tensor | QuantizedRows
"""What a linear layer reads."""


def empty_rows(shape: torch.Size, device: torch.device) -> QuantizedRows:
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    return QuantizedRows(values, torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device))


def rounds_first(device: torch.device) -> bool:
    """Whether a kernel rounds to e4m3 itself before it converts."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < CONVERTS_EXACTLY


QUANTIZE_ROWS = Contract(
    "quantize_rows",
    FP8,
    (Operand("x", "M K", DTYPES, "contiguous"),),
    {
        "M": Size("there are {} rows", at_least=1, at_most=MAX_ROWS),
        "K": Size("there are {} channels", at_least=1, at_most=MAX_CHANNELS),
    },
)


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """x [M, K] -> (values e4m3fn [M, K], scale float32 [M, 1]), x ~ values * scale."""
    from . import _linear_triton as kernels

    rows, channels = x.shape
    out = empty_rows(x.shape, x.device)
    block = next_power_of_two(channels)
    with on_device_of(x):
        kernels.quantize_rows[rows,](
            x, *out, K=channels, BLOCK=block, ROUND=rounds_first(x.device), num_warps=min(8, max(1, block // 2048))
        )  # fmt: skip
    return out


SCALE_PRODUCT = Contract(
    "scale_product",
    FP8,
    (
        Operand("product", "M N", (torch.float32,), "contiguous"),
        Operand("rows", "M 1", (torch.float32,), "contiguous"),
        Operand("columns", "1 1|N", (torch.float32,), "contiguous"),
        Operand("bias", "N", DTYPES, "contiguous", optional=True),
    ),
    {
        "M": Size("there are {} rows", at_least=1, at_most=MAX_ROWS),
        "N": Size("there are {} columns", at_least=1),
    },
    {"dtype": DTYPES},
)


def scale_product(
    product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """product [M, N] * (rows [M, 1] * columns [1, 1] or [1, N]) + bias [N] -> [M, N], rounded once to `dtype`."""
    from . import _linear_triton as kernels

    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    m, n = product.shape
    with on_device_of(product):
        kernels.scale_product[m, -(-n // COLUMNS)](
            product, rows, columns, out if bias is None else bias, out, n,
            PER_COLUMN=columns.shape[1] > 1, BIASED=bias is not None, BLOCK=COLUMNS,
            num_warps=4, enable_fp_fusion=False,  # eager rounds the product before it adds
        )  # fmt: skip
    return out
