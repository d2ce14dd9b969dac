"""Every attention mode and quantisation through one window on the CPU, against `sdpa` without quantisation.

The bounds hold the relative L2 difference of the window's latents after three guided steps in float32, at about twice
what was measured. The tiny model has random weights, whose attention is soft; trained ones are held to the bounds of
each kernel in the tests of the attention backends.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import pytest
import torch
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.multitalk.audio import Wav2Vec2Features, load_speech
from wanvideo_infinitetalk.multitalk.pictures import load_picture
from wanvideo_infinitetalk.multitalk.pipeline import Conditioning, FinishedWindow, GenerateConfig, generate
from wanvideo_infinitetalk.tiny import TinySet
from wanvideo_infinitetalk.wanvideo.checkpoints import load_dit
from wanvideo_infinitetalk.wanvideo.clip import ClipVision
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError
from wanvideo_infinitetalk.wanvideo.modules.attention import ATTENTION_MODES, mode_reasons
from wanvideo_infinitetalk.wanvideo.policy import bind
from wanvideo_infinitetalk.wanvideo.text import TextEncoder
from wanvideo_infinitetalk.wanvideo.vae import WanVAE

FRAMES = 9

# Mode -> the least and the most that it may differ; the least shows that it was not sdpa in disguise.
MODE_BOUNDS = {
    "sdpa": (0.0, 0.0),
    "auto": (0.0, 0.0),
    "eager": (1e-9, 1e-5),
    "sageattn": (1e-4, 0.005),
    "sageattn_3_fp8": (1e-4, 0.005),
    "sageattn_3": (1e-3, 0.02),
    "sageattn_3_fp4": (1e-3, 0.02),
}

QUANTIZATION_BOUNDS = {
    "disabled": (0.0, 0.0),
    "fp8_e4m3fn": (0.01, 0.08),
    "fp8_e4m3fn_scaled": (0.01, 0.08),
    "fp8_e4m3fn_fast": (0.01, 0.12),
    "fp8_e4m3fn_scaled_fast": (0.01, 0.12),
    "fp8_e5m2": (0.02, 0.18),
    "fp8_e5m2_scaled": (0.02, 0.18),
    "fp8_e5m2_fast": (0.02, 0.2),
    "fp8_e5m2_scaled_fast": (0.02, 0.2),
    "fp4_scaled": (0.05, 0.27),
}

Run = Callable[..., FinishedWindow]


@pytest.fixture(scope="module")
def run(tiny_set: TinySet) -> Run:
    """`run(mode=..., quantization=...)`: the only window of a third of a second of the demo."""
    assets = files("wanvideo_infinitetalk").joinpath("assets")
    speech = load_speech(str(assets.joinpath("speech.wav")))[16000 : 16000 + 640 * FRAMES]
    heard = Wav2Vec2Features.load(tiny_set.wav2vec)(speech)
    context, negative = TextEncoder.load(tiny_set.text_encoder, dtype=torch.float32).encode(
        ["A woman speaks", "blurry"]
    )
    picture = load_picture(str(assets.joinpath("portrait.png")))
    given = Conditioning(context, negative, [heard], [picture])
    vae = WanVAE.load(tiny_set.vae, dtype=torch.float32)
    clip = ClipVision.load(tiny_set.clip_vision, dtype=torch.float32)

    def go(mode: str = "sdpa", quantization: str = "disabled", policy: str = "uniform") -> FinishedWindow:
        model = load_dit(tiny_set.model, tiny_set.adapter, base_dtype=torch.float32, quantization=quantization)
        config = GenerateConfig(
            width=64,
            height=64,
            frames=FRAMES,
            motion_frames=1,
            steps=3,
            attention_policy=bind(policy, mode, model.config.num_layers),
        )
        (window,) = generate(model, vae, clip, given, config, fallback=())
        return window

    return go


@pytest.fixture(scope="module")
def reference(run: Run) -> FinishedWindow:
    return run()


def difference(window: FinishedWindow, reference: FinishedWindow) -> float:
    assert torch.isfinite(window.latents).all()
    assert window.frames.shape == (FRAMES, 64, 64, 3)
    assert torch.isfinite(window.frames).all()
    assert float(window.frames.std()) > 0.05  # neither black nor grey
    return float((window.latents - reference.latents).norm() / reference.latents.norm())


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_attention_modes(run: Run, reference: FinishedWindow, mode: str) -> None:
    if all(mode_reasons(torch.device("cpu"))[mode].values()):
        with pytest.raises(BackendUnavailableError, match=f"'{mode}' cannot serve this call"):
            run(mode)
        return
    least, most = MODE_BOUNDS[mode]
    assert least <= difference(run(mode), reference) <= most


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantizations(run: Run, reference: FinishedWindow, quantization: str) -> None:
    least, most = QUANTIZATION_BOUNDS[quantization]
    assert least <= difference(run(quantization=quantization), reference) <= most


def test_a_quantised_mode_on_quantised_weights(run: Run, reference: FinishedWindow) -> None:
    assert 0.05 < difference(run("sageattn_3_fp4", "fp4_scaled"), reference) <= 0.27


def test_the_policy_lies_between_its_modes(run: Run, reference: FinishedWindow) -> None:
    everywhere = difference(run("sageattn_3_fp4"), reference)
    middle = difference(run("sageattn_3_fp4", policy="ends_16bit"), reference)
    assert 0 < middle < everywhere


def test_runs_repeat(run: Run, reference: FinishedWindow) -> None:
    """What lets the other bounds be read as the doing of the mode alone."""
    assert difference(run(), reference) == 0
