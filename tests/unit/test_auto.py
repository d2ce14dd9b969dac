"""Mode "auto": what it measures and what it takes."""

import math

import pytest
import torch
from wanvideo_infinitetalk.wanvideo.kernels.inputs import Inputs
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules import auto
from wanvideo_infinitetalk.wanvideo.modules.auto import MAX_RELATIVE_L2, Measurement, fastest
from wanvideo_infinitetalk.wanvideo.modules.backends import RUNTIME
from wanvideo_infinitetalk.wanvideo.runtime import timing
from wanvideo_infinitetalk.wanvideo.runtime.timing import MOST, milliseconds


def test_the_fastest_of_the_accurate_wins():
    results = [
        Measurement("sdpa", 38.0, 0.0),
        Measurement("triton_fp8", 24.0, 0.03),
        Measurement("triton_fp4", 20.0, MAX_RELATIVE_L2 * 2),
        Measurement("broken", 1.0, math.nan),
    ]
    assert fastest(results) == "triton_fp8"
    assert fastest(results[:1] + results[2:]) == "sdpa"


def test_nothing_accurate_leaves_sdpa():
    assert fastest([Measurement("triton_fp4", 20.0, 1.0)]) == "sdpa"


def test_short_calls_are_timed_in_a_row_and_long_ones_once(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def lasting(seconds):
        def call():
            calls.append(seconds)
            clock[0] += seconds

        return call

    cpu = torch.device("cpu")
    assert milliseconds(lasting(0.002), cpu, lasting=10.0) == pytest.approx(2.0)
    assert len(calls) == 1 + 5
    calls.clear()
    assert milliseconds(lasting(0.02), cpu, lasting=10.0) == pytest.approx(20.0)
    assert len(calls) == 1
    calls.clear()
    milliseconds(lasting(0.0), cpu)
    assert len(calls) == 1 + MOST


def test_every_candidate_is_measured_against_sdpa():
    q, k, v = (torch.randn(1, 64, 2, 64) for _ in range(3))
    found = {m.backend: m for m in auto.measure(["sdpa", "emulated_fp8"], Inputs(q, k, v))}
    assert found["sdpa"].relative_l2 == 0.0
    assert 0.005 < found["emulated_fp8"].relative_l2 < MAX_RELATIVE_L2
    assert all(m.milliseconds > 0 for m in found.values())


@pytest.mark.parametrize("keys", [1, auto.MIN_TOKENS, 3 * auto.MIN_TOKENS])
def test_the_cpu_takes_sdpa_without_measuring(monkeypatch, keys):
    monkeypatch.setattr(auto, "measure", lambda *a: pytest.fail("measured"))
    q, k = torch.randn(1, 8, 1, 64), torch.randn(1, keys, 1, 64)
    assert auto.choose(Inputs(q, k, k)) == "sdpa"


def test_auto_alone_is_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(auto, "choose", lambda inputs: asked.append(1) or "emulated_fp8")
    q, k, v = (torch.randn(1, 40, 2, 64) for _ in range(3))
    assert torch.equal(modes.attention(q, k, v, "auto"), modes.attention(q, k, v, "sageattn_3_fp8"))
    assert asked == [1]
    modes.attention(q, k, v, "sdpa")
    assert asked == [1]


@pytest.mark.cuda
def test_on_a_gpu_it_measures_once_per_shape_and_is_accurate(caplog):
    q, k, v = (torch.randn(1, 4096, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    RUNTIME.reset()
    with caplog.at_level("INFO", logger=auto.__name__):
        out = [modes.attention(q, k, v, "auto") for _ in range(2)]
    assert sum("auto takes" in record.message for record in caplog.records) == 1
    expected = modes.attention(q, k, v, "eager").float()
    assert (out[1].float() - expected).norm() / expected.norm() < MAX_RELATIVE_L2
    assert len(RUNTIME._chosen) == 1
