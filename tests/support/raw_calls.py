"""The generated attention cases, given to PyTorch's SDPA without any guard, in child processes (`support.children`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from support.attention_cases import case, reference, relative_error, tensors
from support.children import FAULT, Answer, ask, serve

RIGHT, WRONG, REJECTED, LOST = "right", "wrong", "rejected", "GPU lost"
OUTCOMES = (RIGHT, WRONG, REJECTED, FAULT, LOST)
"""`LOST`: the child could not even make its inputs, which says nothing about the call."""

WORKERS = 8


def outcomes(numbers: Sequence[int]) -> dict[int, str]:
    """number -> one of `OUTCOMES`."""
    answers = ask(Path(__file__), list(numbers), workers=WORKERS)
    return {number: answer["outcome"] for number, answer in zip(numbers, answers, strict=True)}


def raw(number: int) -> Answer:
    """What SDPA does with the case as it lies."""
    one = case(number)
    try:
        q, k, v = tensors(one, "cuda")
        want = reference(q, k, v, one.scale)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"outcome": LOST, "error": str(error).splitlines()[0]}
    try:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=one.scale).transpose(1, 2)
        torch.cuda.synchronize()
    except RuntimeError as error:
        poisoned = "CUDA error" in str(error) or "misaligned" in str(error)
        return {"outcome": FAULT if poisoned else REJECTED, "error": str(error).splitlines()[0]}
    if one.values == "large qk":  # rounding decides which key wins: only a mixture of V's rows is owed
        right = bool(out.isfinite().all()) and float(out.abs().amax()) <= 1.3 * float(v.abs().amax())
    else:
        right = bool(out.isfinite().all()) and relative_error(out, want) <= (1e-3 if one.dtype == "fp32" else 0.02)
    return {"outcome": RIGHT if right else WRONG}


if __name__ == "__main__":
    serve(raw)
