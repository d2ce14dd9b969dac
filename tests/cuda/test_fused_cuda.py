"""The fused elementwise groups on the GPU: as near to float64 as one rounding allows, whatever the address and size.

"Numerically unchanged" is this bound: half a unit in the last place of the result's dtype, which the eager forms keep
too (`benchmarks/fused_cases.py`), so that a fused form differs from the eager one by at most one unit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.benchmarks.fused_cases import (
    GROUPS,
    KINDS,
    SLACK,
    calls,
    exact,
    excess,
    only_eager,
    why_eager,
)
from wanvideo_infinitetalk.wanvideo.kernels import fused, linear, reference, selftest
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.modules import elementwise
from wanvideo_infinitetalk.wanvideo.modules.model import AudioConfig, WanConfig, WanModel

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")
SHAPES = [(1, 33, 40, 128), (2, 9, 12, 128), (3, 5, 2, 64), (2, 4, 3, 96), (1, 1, 1, 8), (1, 3, 128, 128)]
"""Batch, length, heads, head_dim; 5120 and 1536 channels are those of Wan 14B and 1.3B."""


def tensors(call: tuple[Any, ...]) -> list[Tensor]:
    return [x for part in call for x in (part if isinstance(part, tuple) else (part,)) if isinstance(x, Tensor)]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_form_rounds_once(group: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in KINDS:
        call = calls(*shape, GPU, dtype, kind)[group]
        before = [x.clone() for x in tensors(call)]
        assert not why_eager(group, call), f"the kernel does not support {shape}"
        for form in (reference, fused):
            assert excess(group, getattr(form, group)(*call), call) <= 1.0, f"{form}, {kind}"
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(call), strict=True)), "an input changed"


@pytest.mark.parametrize("group", ["modulated_norm", "affine_norm", "add_modulated_norm", "add_affine_norm"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_quantized_rows_are_those_of_the_exact_result(group: str, shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        call = calls(*shape, GPU, torch.bfloat16, kind)[group]
        rows = getattr(fused, group)(*call, True)
        if group.startswith("add_"):
            sums, rows = rows
            assert torch.equal(sums, getattr(fused, group)(*call)[0])
            group, call = group.removeprefix("add_"), (sums, *call[3:])
        [(wanted, size)] = exact(group, call)
        assert_rows(rows, wanted, SLACK * size)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 7, 108, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_quantized_sums_and_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in KINDS:
        x, y, _ = calls(*shape, GPU, dtype, kind)["gated_residual"]
        wanted = x.double() + y.double()
        assert_rows(fused.add_rows(x, y), wanted, SLACK * wanted.abs())
        wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
        assert_rows(fused.gelu_rows(x), wanted, SLACK * x.double().abs())


def assert_rows(rows: linear.QuantizedRows, wanted: Tensor, slack: Tensor) -> None:
    """One rounding to e4m3, whose numbers are 2^-3 apart, and the smallest of them 2^-9 of the scale."""
    scale = rows.scale.double()
    largest = wanted.abs().amax(-1, keepdim=True) / 448
    assert ((scale - largest).abs() <= 2.0**-20 * largest + slack.amax(-1, keepdim=True) / 448 + 2e-38).all()
    error = (rows.values.double() * scale - wanted).abs()
    assert (error <= (1 + 2.0**-12) * (2.0**-4 * wanted.abs() + 2.0**-10 * scale) + slack).all()


@torch.no_grad()
def test_the_chosen_forms_round_once_too() -> None:
    """What the model calls: a form that rounds more often may not be chosen."""
    for kind in KINDS:
        for group, call in calls(2, 9, 12, 128, GPU, torch.bfloat16, kind).items():
            assert excess(group, getattr(elementwise, group)(*call), call) <= 1.0, f"{group}, {kind}"


def test_a_gpu_that_is_asked_agrees() -> None:
    """The comparison that decides on GPUs which this suite has not run on."""
    device = torch.device("cuda", torch.cuda.current_device())
    verdict = selftest.judge("elementwise", selftest._elementwise_comparisons(device), selftest._ulp_fault)
    assert verdict.ok, verdict.reason
    assert verdict.cases >= 6


@pytest.mark.parametrize("offset", [1, 2, 4, 7])
@torch.no_grad()
def test_any_address(offset: int) -> None:
    """Contiguous tensors that begin anywhere: Triton loads as narrowly as it must."""

    def moved(part: Any) -> Any:
        if isinstance(part, tuple):
            return type(part)(*(moved(x) for x in part))
        if not isinstance(part, Tensor) or not part.is_contiguous():
            return part
        room = torch.empty(part.numel() + offset, dtype=part.dtype, device=part.device)
        return room[offset:].view(part.shape).copy_(part)

    for group, call in calls(2, 9, 12, 128, GPU, torch.bfloat16, "normal").items():
        given = tuple(moved(part) for part in call)
        assert not why_eager(group, given)
        assert excess(group, getattr(fused, group)(*given), call) <= 1.0, group


@torch.no_grad()
def test_non_finite_values_stay_in_their_row() -> None:
    for group, call in calls(1, 9, 12, 128, GPU, torch.bfloat16, "normal").items():
        call[0][0, 4, 100] = torch.nan
        results = getattr(fused, group)(*call)
        out = (results[0] if isinstance(results, tuple) else results).flatten(2)
        assert out[0, 4].isnan().any()
        assert out[0, :4].isfinite().all()
        assert out[0, 5:].isfinite().all()


@torch.no_grad()
def test_a_captured_graph_replays() -> None:
    for group, call in calls(1, 33, 12, 128, GPU, torch.bfloat16, "normal").items():
        run = getattr(fused, group)
        expected = run(*call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(*call)
        graph.replay()
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


@torch.no_grad()
def test_a_model_gives_the_same_with_fused_groups() -> None:
    """Two forwards that round at the same places lie apart as two summation orders do, and no more."""
    torch.manual_seed(0)
    audio = AudioConfig(intermediate_dim=32, output_dim=32, context_tokens=4, blocks=2, channels=16)
    config = WanConfig(
        text_len=16, dim=256, ffn_dim=512, text_dim=32, num_heads=2, num_layers=3, clip_dim=32, audio=audio
    )
    model = WanModel(config).to(GPU, torch.bfloat16).eval()
    exact = WanModel(config).to(GPU).eval()
    exact.load_state_dict(model.state_dict())
    given = {
        "x": torch.randn(16, 3, 16, 16, device=GPU),
        "t": torch.tensor([700.0], device=GPU),
        "context": torch.randn(16, 32, device=GPU),
        "y": torch.randn(1, 20, 3, 16, 16, device=GPU),
        "clip_fea": torch.randn(1, 257, 32, device=GPU),
        "audio": torch.randn(1, 9, 5, 2, 16, device=GPU),
    }
    wanted = exact(**given)
    with only_eager():
        eager = model(**given)
    by_kernels = model(**given)
    assert relative_l2(by_kernels, wanted) <= 1.1 * relative_l2(eager, wanted)
