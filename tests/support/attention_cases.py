"""Generated attention calls: sizes, layouts, values; the float64 reference; and what a result must satisfy.

Cases come from a seed, so that a failing one is named by its number: `case(17)`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (64, 96, 128)
BORDERS = tuple(n + d for n in (16, 32, 64, 128, 256, 512) for d in (-1, 0, 1))
LAYOUTS = (
    "plain",
    "offset",  # contiguous, starting 1 to 15 elements past an aligned address
    "padded rows",  # a token stride off 16 bytes
    "padded heads",  # a head stride off 16 bytes
    "sliced heads",
    "fused",  # a slice of [B, L, 3, H, D]
    "transposed",  # stored as [B, H, L, D]
    "expanded",  # one batch for all, stride 0
    "channels first",  # last stride not 1
    "sliced tokens",
)
VALUES = ("normal", "normal", "normal", "biased", "large v", "large qk", "equal keys", "equal values", "zeros")


@dataclass(frozen=True)
class Case:
    """One call; `layouts` and `offsets` are those of q, k and v."""

    number: int
    dtype: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    layouts: tuple[str, str, str]
    offsets: tuple[int, int, int]
    values: str
    scale: float | None

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.queries, self.heads, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.keys, self.heads, self.head_dim


def _length(rng: random.Random, longest: int) -> int:
    return rng.choice((rng.randint(1, longest), rng.choice([n for n in BORDERS if n <= longest]), rng.randint(1, 40)))


def case(number: int) -> Case:
    """The case of that number, always the same."""
    rng = random.Random(f"attention case {number}")
    kind = rng.choice(LAYOUTS)
    layouts = rng.choice(((kind, kind, kind), ("plain", kind, kind), tuple(rng.choice(LAYOUTS) for _ in range(3))))
    dim = rng.choice(HEAD_DIMS)
    return Case(
        number=number,
        dtype=rng.choice(tuple(DTYPES)),
        batch=rng.randint(1, 3),
        queries=_length(rng, 513),
        keys=_length(rng, 1024),
        heads=rng.randint(1, 4),
        head_dim=dim,
        layouts=layouts,  # type: ignore[arg-type]
        offsets=(rng.randint(1, 15), rng.randint(1, 15), rng.randint(1, 15)),
        values=rng.choice(VALUES),
        scale=rng.choice((None, None, None, dim**-0.5 / 2, 0.05)),
    )


def laid_out(x: torch.Tensor, layout: str, offset: int) -> torch.Tensor:
    """The values of x [B, L, H, D] in that layout ("expanded" repeats the first batch)."""
    batch, length, heads, dim = x.shape
    if layout == "plain":
        return x
    if layout == "offset":
        return x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
    if layout == "padded rows":
        wide = x.new_empty(batch, length, heads * dim + offset)
        return wide[..., : heads * dim].unflatten(-1, (heads, dim)).copy_(x)
    if layout == "padded heads":
        return x.new_empty(batch, length, heads, dim + offset)[..., :dim].copy_(x)
    if layout == "sliced heads":
        return x.new_empty(batch, length, heads + 2, dim)[:, :, 1:-1].copy_(x)
    if layout == "fused":
        return x.new_empty(batch, length, 3, heads, dim)[:, :, 1].copy_(x)
    if layout == "transposed":
        return x.new_empty(batch, heads, length, dim).transpose(1, 2).copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "channels first":
        return x.new_empty(batch, length, dim, heads).transpose(2, 3).copy_(x)
    if layout == "sliced tokens":
        return x.new_empty(batch, length + 3, heads, dim)[:, 3:].copy_(x)
    raise ValueError(layout)


def tensors(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of a case."""
    generator = torch.Generator(device).manual_seed(case.number)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = normal(case.q_shape), normal(case.kv_shape), normal(case.kv_shape)
    if case.values == "biased":
        k = k + 4 * normal((1, 1, case.heads, case.head_dim))
        v = v + normal((1, 1, case.heads, case.head_dim))
    elif case.values == "large v":
        v = v * 3e4 / v.abs().amax()
    elif case.values == "large qk":
        q, k = q * 3e4 / q.abs().amax(), k * 3e4 / k.abs().amax()
    elif case.values == "equal keys":
        k = k[:, :1].expand(k.shape)
    elif case.values == "equal values":
        v = v[:, :1].expand(v.shape)
    elif case.values == "zeros":
        q, k, v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dtype = DTYPES[case.dtype]
    parts = zip((q, k, v), case.layouts, case.offsets, strict=True)
    return tuple(laid_out(x.to(dtype).clone(memory_format=torch.contiguous_format), *how) for x, *how in parts)  # type: ignore[return-value]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """softmax(q k^T * scale) v in float64, written for itself."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v.double())


def relative_error(out: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2; the norm itself where the reference is zero."""
    norm = want.double().norm()
    return float((out.double() - want.double()).norm() / torch.where(norm > 0, norm, 1.0))


def faults(case: Case, inputs: tuple[torch.Tensor, ...], out: torch.Tensor, bound: float) -> list[str]:
    """What is wrong with a result, beyond a relative L2 error of `bound` against float64; empty when all is well.

    With scores of 1e9 softmax picks one key, and rounding decides which: a mixture of V's rows is all that is owed.
    """
    q, k, v = inputs
    found = []
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        found.append(f"shape {tuple(out.shape)}, {out.dtype}, strides {out.stride()}")
    if not out.isfinite().all():
        return [*found, f"{int((~out.isfinite()).sum())} values are not finite"]
    if case.values == "large qk":
        peak = float(v.double().abs().amax())
        if float(out.double().abs().amax()) > 1.3 * peak:
            found.append("larger than any mixture of V")
        return found
    error = relative_error(out, reference(q, k, v, case.scale))
    if not error <= bound:
        found.append(f"relative error {error:.4g}, bound {bound:g}")
    return found
