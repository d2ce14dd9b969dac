"""The generator of attention calls covers what it promises, and its judge can fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.attention_cases import (
    BORDERS,
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    VALUES,
    case,
    faults,
    laid_out,
    reference,
    tensors,
)
from wanvideo_infinitetalk.wanvideo.kernels.layout import layout_violations
from wanvideo_infinitetalk.wanvideo.modules.attention import run_backend

BOUNDS = {"sdpa": 0.01, "emulated_fp8": 0.06, "emulated_nvfp4": 0.26}


def test_cases_cover_the_ground() -> None:
    cases = [case(n) for n in range(2000)]
    assert {c.dtype for c in cases} == set(DTYPES)
    assert {c.head_dim for c in cases} == set(HEAD_DIMS)
    assert {layout for c in cases for layout in c.layouts} == set(LAYOUTS)
    assert {offset for c in cases for offset in c.offsets} == set(range(1, 16))
    assert {c.values for c in cases} == set(VALUES)
    assert {c.batch for c in cases} == {1, 2, 3}
    assert set(BORDERS) <= {c.queries for c in cases}
    assert min(c.keys for c in cases) == 1
    assert max(c.keys for c in cases) > 1000
    assert cases[17] == case(17)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_values_and_are_as_named(layout: str) -> None:
    x = torch.randn(2, 5, 4, 16).to(torch.bfloat16)
    y = laid_out(x, layout, 3)
    assert torch.equal(y, x[:1].expand(x.shape) if layout == "expanded" else x)
    broken = layout in ("offset", "padded rows", "padded heads", "channels first")
    assert bool(layout_violations(y)) == broken


@pytest.mark.parametrize("name", BOUNDS)
def test_portable_modes_meet_small_cases(name: str) -> None:
    tried = 0
    for number in range(120):
        one = case(number)
        if one.batch * one.heads * one.queries * one.keys > 60_000:
            continue
        tried += 1
        qkv = tensors(one, "cpu")
        assert faults(one, qkv, run_backend(name, *qkv, softmax_scale=one.scale), BOUNDS[name]) == []
    assert tried > 40


def test_the_judge_finds_what_is_wrong() -> None:
    one = dataclasses.replace(case(0), values="normal", heads=2, queries=8, keys=9, layouts=("plain",) * 3)
    qkv = tensors(one, "cpu")
    right = torch.empty(one.q_shape, dtype=qkv[0].dtype).copy_(reference(*qkv, one.scale))
    assert faults(one, qkv, right, 0.01) == []
    assert "relative error" in faults(one, qkv, right * 1.1, 0.01)[0]
    assert "strides" in faults(one, qkv, right.transpose(1, 2).contiguous().transpose(1, 2), 0.01)[0]
    broken = right.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert faults(one, qkv, broken, 0.01) == ["1 values are not finite"]
    large = dataclasses.replace(one, values="large qk")
    assert faults(large, qkv, right * 100, 0.01) == ["larger than any mixture of V"]
