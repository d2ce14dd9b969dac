"""Every attention mode and quantization through one window on the CPU, against `sdpa` without quantization.

The bounds are those of `support.tiny_run`, which the GPU is held to as well. The tiny model has random weights, whose
attention is soft; trained ones are held to the bounds of each kernel in the tests of the attention backends.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_run import MODE_BOUNDS, QUANTIZATION_BOUNDS, Made, Prepared, prepare, run, why_not
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2
from wanvideo_infinitetalk.wanvideo.modules.attention import ATTENTION_MODES

FRAMES = 9


@pytest.fixture(scope="module")
def given(tiny_set: TinySet) -> Prepared:
    return prepare(tiny_set, "cpu", torch.float32, FRAMES, FRAMES)


@pytest.fixture(scope="module")
def reference(given: Prepared) -> Made:
    return run(given, "sdpa", "disabled")


def difference(made: Made, reference: Made) -> float:
    assert torch.isfinite(made.latents).all()
    assert made.frames.shape == (FRAMES, 96, 96, 3)
    assert torch.isfinite(made.frames).all()
    assert float(made.frames.std()) > 0.05  # neither black nor gray
    assert made.guards.calls > 0
    assert made.guards.copies == 0
    return relative_l2(made.latents, reference.latents)


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_attention_modes(given: Prepared, reference: Made, mode: str) -> None:
    if why_not(mode, "cpu"):
        with pytest.raises(BackendUnavailableError, match=f"'{mode}' does not support this call"):
            run(given, mode, "disabled")
        return
    least, most = MODE_BOUNDS[mode]
    assert least <= difference(run(given, mode, "disabled", "uniform"), reference) <= most


def test_auto_is_sdpa_on_the_cpu(given: Prepared, reference: Made) -> None:
    assert difference(run(given, "auto", "disabled"), reference) == 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantizations(given: Prepared, reference: Made, quantization: str) -> None:
    least, most = QUANTIZATION_BOUNDS[quantization]
    assert least <= difference(run(given, "sdpa", quantization), reference) <= most


def test_a_quantized_mode_on_quantized_weights(given: Prepared, reference: Made) -> None:
    made = run(given, "sageattn_3_fp4", "fp4_scaled", "uniform")
    assert 0.05 < difference(made, reference) <= 0.27


def test_a_policy_runs_more_than_one_mode(given: Prepared, reference: Made) -> None:
    everywhere = run(given, "sageattn_3_fp4", "disabled", "uniform")
    middle = run(given, "sageattn_3_fp4", "disabled", "ends_16bit")
    assert difference(middle, everywhere) > 1e-3
    assert 1e-3 < difference(middle, reference) <= MODE_BOUNDS["sageattn_3_fp4"][1]


def test_runs_repeat(given: Prepared, reference: Made) -> None:
    """What lets the other bounds be read as the doing of the mode alone."""
    assert difference(run(given, "sdpa", "disabled"), reference) == 0
