"""Quantizing the activations of an fp8 linear layer, and scaling its product: one Triton kernel each.

Bit-equal to the eager forms in `reference.py`; each function has its contract in front. Any address is right: Triton
loads by the alignment it finds. Whether a kernel runs is chosen in `fp8_optimization`.
"""

from __future__ import annotations

import torch

from ._common import next_power_of_two, on_device_of
from .contract import Contract, Device, Operand, Size
from .fused import MAX_CHANNELS, MAX_ROWS

__all__ = ["QUANTIZE_ROWS", "SCALE_PRODUCT", "quantize_rows", "scale_product"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FP8 = Device(min_capability=(8, 9), purpose="Triton converts float32 to e4m3 there", triton=True)
"""Below it there is no fp8 matmul to quantize for either."""

CONVERTS_EXACTLY = (9, 0)
"""From here on every Triton converts float32 to e4m3 by one instruction that rounds once."""

COLUMNS = 1024
"""Of one program of `scale_product`."""


QUANTIZE_ROWS = Contract(
    "quantize_rows",
    FP8,
    (Operand("x", "M K", DTYPES, "contiguous"),),
    {
        "M": Size("there are {} rows", at_least=1, at_most=MAX_ROWS),
        "K": Size("there are {} channels", at_least=1, at_most=MAX_CHANNELS),
    },
)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (values e4m3fn [M, K], scale float32 [M, 1]), x ~ values * scale."""
    from . import _linear_triton as kernels

    rows, channels = x.shape
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = next_power_of_two(channels)
    exact = x.is_cuda and torch.cuda.get_device_capability(x.device) >= CONVERTS_EXACTLY
    with on_device_of(x):
        kernels.quantize_rows[rows,](
            x, values, scale, K=channels, BLOCK=block, ROUND=not exact, num_warps=min(8, max(1, block // 2048))
        )  # fmt: skip
    return values, scale


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
