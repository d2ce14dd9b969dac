"""The generator of attention layers covers what it promises, and its judge can fail."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from support.attention_cases import case
from support.layer_cases import (
    FEATURES,
    OUT_FEATURES,
    X_LAYOUTS,
    X_VALUES,
    LayerCase,
    layer_case,
    layer_faults,
    linear_faults,
    linears,
    rows_laid_out,
)
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.wanvideo.kernels.layout import layout_violations
from wanvideo_infinitetalk.wanvideo.modules.attention import attention

SMALL = replace(case(0), batch=2, queries=9, keys=21, heads=2, head_dim=64, scale=None, values="normal")


def test_cases_cover_the_ground() -> None:
    cases = [layer_case(n) for n in range(1000)]
    assert {c.features for c in cases} == set(FEATURES)
    assert {c.out_features for c in cases} == set(OUT_FEATURES)
    assert {c.x_layout for c in cases} == set(X_LAYOUTS)
    assert {c.x_offset for c in cases} == set(range(1, 16))
    assert {c.x_values for c in cases} == set(X_VALUES)
    assert {c.attention.head_dim for c in cases} == {64, 96, 128}
    assert {c.attention.dtype for c in cases} == {"bf16", "fp16", "fp32"}
    assert cases[17] == layer_case(17)


@pytest.mark.parametrize("layout", X_LAYOUTS)
def test_layouts_hold_the_values_and_are_as_named(layout: str) -> None:
    x = torch.randn(2, 5, 16).to(torch.bfloat16)
    y = rows_laid_out(x, layout, 3)
    assert torch.equal(y, x[:1].expand(x.shape) if layout == "expanded" else x)
    assert bool(layout_violations(y)) == (layout in ("offset", "padded rows", "channels first"))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("mode", ["sdpa", "sageattn_3_fp8", "sageattn_3_fp4"])
def test_portable_modes_meet_small_layers(mode: str, quantization: str) -> None:
    for number in range(8):
        one = layer_case(number)
        one = replace(one, attention=replace(one.attention, **{n: getattr(SMALL, n) for n in ("queries", "keys")}))
        assert layer_faults(one, mode, quantization, "cpu")[1] == [], one


def test_the_judge_finds_wrong_attention() -> None:
    one = LayerCase(0, replace(SMALL, dtype="fp32"), 64, 96, "plain", 1, "normal", 0)
    judge = functools.partial(layer_faults, one, "sdpa", "fp8_e4m3fn_fast", "cpu")
    assert judge() == ("sdpa", [], judge()[2])

    def mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mode: str, softmax_scale: float | None) -> torch.Tensor:
        return v.mean(1, keepdim=True).expand(q.shape).clone()

    def writing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mode: str, softmax_scale: float | None):
        out = attention(q, k, v, mode, softmax_scale=softmax_scale)
        k -= k.mean(1, keepdim=True)
        return out

    assert "attention: relative error" in judge(attend=mean)[1][0]
    assert judge(attend=writing)[1] == ["attention changed an input"]


@pytest.mark.parametrize("quantization", ["disabled", "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
def test_the_judge_finds_wrong_linears(quantization: str) -> None:
    one = LayerCase(0, replace(SMALL, dtype="bf16"), 64, 96, "plain", 1, "normal", 3)
    linear = linears(one, quantization, torch.Generator().manual_seed(0))["q"]
    assert linear.weight.storage_offset() == 3
    x = torch.randn(2, 40, 64).bfloat16()
    right = linear(x)
    assert linear_faults(linear, x, right, few=False) == []
    assert "relative error" in linear_faults(linear, x, right * 1.1, few=True)[0]
    assert "strides" in linear_faults(linear, x, right.transpose(0, 1).contiguous().transpose(0, 1), few=False)[0]
    assert "not finite" in linear_faults(linear, x, right / 0, few=False)[0]
