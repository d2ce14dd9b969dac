"""fp8 linears against the numbers of the public static-scale implementation, on the same stored weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from wanvideo_infinitetalk.fp8_optimization import convert_fp8_linear, fp8_linear_forward, quantize_linears
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

BASE_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Weight only: nothing but the base dtype's roundings of activations, weights and output (2^-9 and 2^-12 at most each).
WEIGHT_ONLY = {"bf16": 6e-3, "f16": 8e-4, "f32": 2e-6}


def cases(item):
    """(weight's name, base dtype's name, "scaled" or "noscale", expected) of each output that fits in its dtype."""
    for key, expected in item.outputs.items():
        form, base, scaling = key.split(".")
        if bool(torch.isfinite(expected).all()):
            yield form, base, scaling, expected


def layer(item, form, scaling):
    weight = item.weights[f"{form}.weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(item.weights["bias"], requires_grad=False)
    scale = item.weights[f"{form}.scale_weight"] if scaling == "scaled" else None
    exact = weight.double() * (1.0 if scale is None else scale.double())
    return linear, scale, exact


def source(item, base):
    return item.inputs.get(f"input_{base}", item.inputs["input_f32"])


def test_the_fast_matmul_errs_less_than_the_static_scale(golden):
    item = golden("fp8_linear")
    seen = 0
    for form, base, scaling, expected in cases(item):
        linear, scale, weight = layer(item, form, scaling)
        x = source(item, base)
        before = x.clone()
        if scale is not None:
            linear.scale_weight = scale
        out = fp8_linear_forward(linear, BASE_DTYPES[base], x)
        exact = x.double() @ weight.t() + linear.bias.double()
        assert torch.equal(x, before), "the input was written to"
        assert out.dtype == expected.dtype
        assert out.shape == expected.shape
        assert out.is_contiguous()
        assert relative_l2(out, exact) <= relative_l2(expected, exact), (form, base, scaling)
        assert relative_l2(out, exact) <= 0.04, (form, base, scaling)
        seen += 1
    assert seen, "the golden has no case"


def test_within_the_clamp_both_agree(golden):
    """Rows that the static scale does not clamp: the two quantize the same numbers, only at other scales."""
    item = golden("fp8_linear")
    for form, base, scaling, expected in cases(item):
        x = source(item, base)
        unclamped = x.abs().amax(-1) <= item.config["clamp"]
        if not unclamped.any():
            continue
        linear, scale, _ = layer(item, form, scaling)
        convert_fp8_linear(
            linear, BASE_DTYPES[base], scale_weight_keys=None if scale is None else {"scale_weight": scale}
        )
        assert relative_l2(linear(x)[unclamped], expected[unclamped]) <= 0.06, (form, base, scaling)


@pytest.mark.parametrize("as_sequence", [False, True])
def test_weight_only_is_exact_to_the_base_dtype(golden, as_sequence):
    item = golden("fp8_linear")
    for form, base, scaling, _ in cases(item):
        linear, scale, weight = layer(item, form, scaling)
        if scale is not None:
            linear.scale_weight = scale
        model = nn.Module()
        model.blocks = nn.ModuleList([linear])
        quantize_linears(model, "disabled", BASE_DTYPES[base])
        x = source(item, base) if as_sequence else source(item, base)[0]
        exact = x.double() @ weight.t() + linear.bias.double()
        assert relative_l2(linear(x), exact) <= WEIGHT_ONLY[base], (form, base, scaling)
