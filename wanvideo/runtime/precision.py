"""What a model computes in, by the names that users choose from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PRECISIONS", "fp16_accumulation"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16_fast": torch.float16}
"""Name -> dtype of weights and activations; fp16_fast: with `fp16_accumulation`."""


@contextmanager
def fp16_accumulation(wanted: bool) -> Iterator[None]:
    """Where `wanted`, let a GPU add up products of float16 matrices in float16, in all of torch, inside the context."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = wanted or before
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = before
