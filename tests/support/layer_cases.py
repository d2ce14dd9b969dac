"""Generated attention layers: quantized linears before and after the attention of one mode, at awkward layouts.

    x -> linears q, k, v -> heads, laid out anew -> attention in a mode -> linear o

Every stage is judged for itself, against float64 on the very tensors that it was given, so that a bound is that of one
kernel. Cases come from a seed, so that a failing one is named by its number: `layer_case(17)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from wanvideo_infinitetalk import fp8_optimization as fp8
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards
from wanvideo_infinitetalk.wanvideo.linear.base import QuantizedLinear, relative_l2
from wanvideo_infinitetalk.wanvideo.linear.nvfp4 import NVFP4Linear, nvfp4_matmul_reasons
from wanvideo_infinitetalk.wanvideo.modules.attention import attention

from support.attention_cases import DTYPES, Case, case, faults, laid_out
from support.mode_bounds import backend_of, bound_of, bound_on

# Relative L2 against the stored weights: the roundings of the base dtype alone, or quantized activations too.
ROUNDING = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
FP4_ACTIVATIONS = 0.13

FEATURES = (1, 7, 16, 33, 48, 64, 96, 100, 120, 128, 250, 256, 512, 520)
FEW = 16
"""Features of x below which q, k and v hold too few independent numbers for the errors of white noise."""
OUT_FEATURES = (1, 7, 16, 17, 64, 96, 100, 128, 250, 320)
X_LAYOUTS = (
    "plain",
    "offset",  # contiguous, starting 1 to 15 elements past an aligned address
    "padded rows",  # a row stride off 16 bytes
    "fused",  # a slice of [B, L, 3, K]
    "sliced tokens",
    "transposed",  # stored as [L, B, K]
    "channels first",  # stored as [B, K, L]
    "expanded",  # one batch for all, stride 0
)
X_VALUES = ("normal", "normal", "normal", "outlier channels", "large", "equal rows", "zeros")
LARGE = {"bf16": 3e4, "fp32": 3e4, "fp16": 8e3}
"""Largest |x|; in fp16 so that the exact product stays within its range."""


@dataclass(frozen=True)
class LayerCase:
    """One layer. Sizes of q, k, v, their layouts, the dtype and the softmax scale are those of `attention`.

    Attributes:
        features: of x, which q, k and v are made from. out_features: of what comes out in the end.
        x_layout, x_offset: how x lies in memory; weight_offset: elements before every stored weight.
        x_values: one of `X_VALUES`.
    """

    number: int
    attention: Case
    features: int
    out_features: int
    x_layout: str
    x_offset: int
    x_values: str
    weight_offset: int


def layer_case(number: int) -> LayerCase:
    """The case of that number, always the same."""
    rng = random.Random(f"layer case {number}")
    return LayerCase(
        number=number,
        # What q, k and v hold comes from x.
        attention=replace(case(rng.randrange(1 << 30)), values="normal"),
        features=rng.choice(FEATURES),
        out_features=rng.choice(OUT_FEATURES),
        x_layout=rng.choice(X_LAYOUTS),
        x_offset=rng.randint(1, 15),
        x_values=rng.choice(X_VALUES),
        weight_offset=rng.choice((0, 0, 1, 3, 8, 15)),
    )


def rows_laid_out(x: torch.Tensor, layout: str, offset: int) -> torch.Tensor:
    """The values of x [B, L, K] in that layout ("expanded" repeats the first batch)."""
    batch, length, features = x.shape
    if layout == "padded rows":
        return x.new_empty(batch, length, features + offset)[..., :features].copy_(x)
    if layout == "fused":
        return x.new_empty(batch, length, 3, features)[:, :, 1].copy_(x)
    if layout == "transposed":
        return x.new_empty(length, batch, features).transpose(0, 1).copy_(x)
    if layout == "channels first":
        return x.new_empty(batch, features, length).transpose(1, 2).copy_(x)
    if layout in ("plain", "offset", "sliced tokens", "expanded"):
        return laid_out(x.unsqueeze(2), layout, offset).squeeze(2)
    raise ValueError(layout)


def activations(one: LayerCase, length: int, generator: torch.Generator) -> torch.Tensor:
    """x [B, length, K] of a case."""
    batch, device = one.attention.batch, generator.device
    x = torch.randn(batch, length, one.features, generator=generator, device=device)
    if one.x_values == "outlier channels":
        x[..., torch.randperm(one.features, generator=generator, device=device)[:4]] *= 100
    elif one.x_values == "large":
        x = x * LARGE[one.attention.dtype] / x.abs().amax()
    elif one.x_values == "equal rows":
        x = x[:, :1].expand(x.shape)
    elif one.x_values == "zeros":
        x = torch.zeros_like(x)
    return rows_laid_out(x.to(DTYPES[one.attention.dtype]).clone(), one.x_layout, one.x_offset)


def linears(one: LayerCase, quantization: str, generator: torch.Generator) -> dict[str, Any]:
    """q, k, v and o of a case, quantized, their stored weights at odd addresses where the case asks for it."""
    inner, device = one.attention.heads * one.attention.head_dim, generator.device
    base = DTYPES[one.attention.dtype]
    made = {}
    for name in "qkvo":
        sizes = (inner, one.out_features) if name == "o" else (one.features, inner)
        linear = nn.Linear(*sizes, device="meta").to_empty(device=device).requires_grad_(False)
        linear.weight.normal_(std=sizes[0] ** -0.5, generator=generator)
        linear.bias.normal_(std=0.1, generator=generator)
        made[name] = linear.to(base)
    holder = nn.ModuleDict({"blocks": nn.ModuleList(made.values())})
    fp8.quantize_linears(holder, quantization, base)
    for linear in made.values():
        if one.weight_offset:
            weight = linear.weight.detach()
            moved = weight.new_empty(weight.numel() + one.weight_offset)[one.weight_offset :].view(weight.shape)
            linear.weight = nn.Parameter(moved.copy_(weight), requires_grad=False)
    return made


def linear_bound(linear: Any) -> float:
    """Relative L2 that a linear layer keeps on normal inputs, against float64 from its stored weight."""
    if not isinstance(linear, QuantizedLinear):
        return ROUNDING[linear.weight.dtype]
    device = linear.weight.device
    if isinstance(linear, NVFP4Linear):
        extents = (linear.out_features, linear.in_features)
        native = not nvfp4_matmul_reasons(*extents, linear.base_dtype, device)
        return FP4_ACTIVATIONS if native else ROUNDING[linear.base_dtype]
    scale = linear.scale_weight
    fast = linear.fast and not fp8.fp8_matmul_reasons(linear.weight, linear.base_dtype, device, scale)
    return fp8.FAST_MATMUL_ERROR if fast else ROUNDING[linear.base_dtype]


def exact_linear(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """In float64, from the stored weight."""
    weight = linear.weight
    if isinstance(linear, QuantizedLinear):
        base, linear.base_dtype = linear.base_dtype, torch.float32
        weight = linear.dequantized_weight()
        linear.base_dtype = base
    return F.linear(x.double(), weight.double(), linear.bias.double())


def linear_faults(linear: Any, x: torch.Tensor, out: torch.Tensor, few: bool) -> list[str]:
    """What is wrong with the output of a linear layer; empty when all is well.

    Args:
        few: the inputs are few, or few of them count, so that their rounding errors scatter.
    """
    expected = exact_linear(linear, x)
    dtype = linear.base_dtype if isinstance(linear, QuantizedLinear) else linear.weight.dtype
    found = []
    if out.shape != expected.shape or out.dtype != dtype or not out.is_contiguous():
        found.append(f"shape {tuple(out.shape)}, {out.dtype}, strides {out.stride()}")
    if not out.isfinite().all():
        return [*found, f"{int((~out.isfinite()).sum())} values are not finite"]
    bound = linear_bound(linear) * (2.2 if few else 1.0)
    error = relative_l2(out, expected)
    if not error <= bound:
        found.append(f"relative error {error:.4g}, bound {bound:g}")
    return found


Attend = Callable[..., torch.Tensor]


def layer_faults(
    one: LayerCase, mode: str, quantization: str, device: str, attend: Attend = attention
) -> tuple[str | None, list[str], int]:
    """(attention kernel that ran, what is wrong with the layer, copies made by the guards)."""
    generator = torch.Generator(device).manual_seed(one.number)
    layers = linears(one, quantization, generator)
    lengths = {"q": one.attention.queries, "k": one.attention.keys, "v": one.attention.keys}
    given = {name: activations(one, length, generator) for name, length in lengths.items()}
    heads = (one.attention.heads, one.attention.head_dim)
    wrong: list[str] = []

    def linear(name: str, x: torch.Tensor, few: bool) -> torch.Tensor:
        before = x.clone()
        out = layers[name](x)
        wrong.extend(f"linear {name}: {fault}" for fault in linear_faults(layers[name], x, out, few))
        if not torch.equal(x, before):
            wrong.append(f"linear {name} changed its input")
        return out

    with count_guards() as stats:
        qkv = []
        for (name, x), layout, offset in zip(given.items(), one.attention.layouts, one.attention.offsets, strict=True):
            few = one.x_values not in ("normal", "large") or x.shape[1] * one.features < 1024
            qkv.append(laid_out(linear(name, x, few).unflatten(-1, heads), layout, offset))
        kernel = backend_of(mode, one.attention, tuple(qkv))
        if kernel is None:
            return None, wrong, stats.copies
        before = [x.clone() for x in qkv]
        out = attend(*qkv, mode, softmax_scale=one.attention.scale)
        # Such scores leave one key, and which one is a matter of rounding.
        values = "large qk" if one.x_values in ("large", "outlier channels") else "normal"
        judged = replace(one.attention, values=values)
        found = faults(judged, tuple(qkv), out, bound_of(mode, judged))
        if found and one.features < FEW and values == "normal":
            found = faults(judged, tuple(qkv), out, bound_on(mode, judged, *qkv))
        wrong += [f"attention: {fault}" for fault in found]
        if not all(torch.equal(x, y) for x, y in zip(qkv, before, strict=True)):
            wrong.append("attention changed an input")
        linear("o", out.flatten(2), few=True)
    return kernel, wrong, stats.copies
