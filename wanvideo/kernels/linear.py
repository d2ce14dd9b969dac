"""Quantising the activations of an fp8 linear layer, and scaling its product: one Triton kernel each.

Bit-equal to the eager forms in `fp8_optimization`; each function has a predicate beside it that says from host data
alone whether the kernel serves a call. Any address is right: Triton loads by the alignment it finds.
"""

from __future__ import annotations

import torch

from ._common import next_power_of_two, on_device_of
from .fused import MAX_CHANNELS, MAX_ROWS, unavailable_reasons

__all__ = ["quantize_rows", "scale_product", "serves_quantize_rows", "serves_scale_product"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 9)
"""Below it Triton converts no float32 to e4m3; nor is there an fp8 matmul to quantise for."""

CONVERTS_EXACTLY = (9, 0)
"""From here on every Triton converts float32 to e4m3 by one instruction that rounds once."""

COLUMNS = 1024
"""Of one program of `scale_product`."""


def _serves(x: torch.Tensor) -> bool:
    return (
        x.is_cuda
        and x.ndim == 2
        and x.is_contiguous()
        and 0 < x.shape[0] <= MAX_ROWS
        and x.shape[1] > 0
        and torch.cuda.get_device_capability(x.device) >= MIN_CAPABILITY
        and not unavailable_reasons(x.device)
    )


def serves_quantize_rows(x: torch.Tensor) -> bool:
    return x.dtype in DTYPES and x.ndim == 2 and x.shape[1] <= MAX_CHANNELS and _serves(x)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (values e4m3fn [M, K], scale float32 [M, 1]), as `fp8_optimization.quantize_rows_fp8`."""
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


def serves_scale_product(
    product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> bool:
    return (
        product.dtype == rows.dtype == columns.dtype == torch.float32
        and dtype in DTYPES
        and rows.shape == (product.shape[0], 1)
        and columns.shape in ((1, 1), (1, product.shape[1]))
        and rows.is_contiguous()
        and columns.is_contiguous()
        and (bias is None or (bias.dtype == dtype and bias.is_contiguous() and bias.shape == product.shape[1:]))
        and _serves(product)
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
