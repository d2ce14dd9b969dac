"""Activations that are quantized once for all fp8 layers that read them: fewer passes, and one rounding less."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from wanvideo_infinitetalk import fp8_optimization as fp8
from wanvideo_infinitetalk.benchmarks.common import SMALL, SMALL_GRID, random_inputs, random_model
from wanvideo_infinitetalk.multitalk import multitalk
from wanvideo_infinitetalk.wanvideo.kernels import reference
from wanvideo_infinitetalk.wanvideo.linear.base import branched, read_rows, relative_l2
from wanvideo_infinitetalk.wanvideo.modules import model as wan

CPU = torch.device("cpu")


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("quantization", ["fp8_e4m3fn_fast", "fp8_e5m2_scaled_fast"])
@torch.no_grad()
def test_a_model_is_as_exact_with_fewer_passes(monkeypatch: pytest.MonkeyPatch, quantization: str, audio: bool) -> None:
    torch.manual_seed(0)
    config = SMALL if audio else dataclasses.replace(SMALL, audio=None)
    model = random_model(config, CPU, torch.bfloat16, quantization)
    given = random_inputs(config, SMALL_GRID, CPU)
    for linear in model.modules():
        if isinstance(linear, fp8.Fp8Linear):
            linear.full_precision = True
    wanted = model(**given)
    for linear in model.modules():
        if isinstance(linear, fp8.Fp8Linear):
            linear.full_precision = False
    passes: list[str] = []

    def quantize(x: torch.Tensor) -> fp8.QuantizedRows:
        passes.append("quantize")
        return reference.quantize_rows(x)

    monkeypatch.setattr(fp8, "quantize_rows_fp8", quantize)
    shared = model(**given)
    few = len(passes)
    passes.clear()
    for module in (wan, multitalk):
        monkeypatch.setattr(module, "read_rows", lambda *_: False)
    apart = model(**given)
    assert relative_l2(shared, wanted) <= 1.05 * relative_l2(apart, wanted)
    # q, k, v; the queries of text and image and their sum; two of the FFN; the queries of the speech.
    assert len(passes) - few == config.num_layers * (8 if audio else 7)


@torch.no_grad()
def test_only_layers_that_quantize_their_input_read_rows() -> None:
    fast, weight_only = nn.Linear(32, 32), nn.Linear(32, 32)
    fp8.Fp8Linear.quantize(fast, torch.float8_e4m3fn, torch.bfloat16, scaled=True, fast=True)
    fp8.Fp8Linear.quantize(weight_only, torch.float8_e4m3fn, torch.bfloat16, scaled=True, fast=False)
    assert read_rows(CPU, fast, fast)
    assert not read_rows(CPU, fast, weight_only)
    assert not read_rows(CPU, fast, nn.Linear(32, 32))
    odd = nn.Linear(24, 32)  # outside the matmul's contract
    fp8.Fp8Linear.quantize(odd, torch.float8_e4m3fn, torch.bfloat16, scaled=True, fast=True)
    assert not read_rows(CPU, odd)
    fast.full_precision = True
    assert not read_rows(CPU, fast)
    fast.full_precision = False
    fast.__class__ = branched(type(fast))  # its branch computes in full precision
    assert not read_rows(CPU, fast)


@torch.no_grad()
def test_rows_of_any_rank_and_their_first_tokens() -> None:
    linear = nn.Linear(32, 48)
    fp8.Fp8Linear.quantize(linear, torch.float8_e4m3fn, torch.bfloat16, scaled=True, fast=True)
    x = torch.randn(1, 7, 32).bfloat16()
    rows = reference.quantize_rows(x)
    assert torch.equal(linear(rows), linear(x))
    assert torch.equal(linear(rows.first(3)), linear(x[:, :3]))
    assert torch.equal(linear(reference.quantize_rows(x[0])), linear(x[0]))
    rows.scale[0, 2] = float("nan")
    assert linear(rows).isnan().all(-1).tolist() == [[False, False, True, *[False] * 4]]
