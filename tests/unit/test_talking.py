"""The talking models as a yardstick: a right mode makes a mouth that follows the speech, a broken one does not.

Two seconds in one short window, in float32 on the CPU, read from the pixels as `benchmarks.lipsync` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from wanvideo_infinitetalk.benchmarks.lipsync import Scene, allowed_loss, frames_of, read_video, speaking
from wanvideo_infinitetalk.media.audio import load_speech, read_audio
from wanvideo_infinitetalk.pipeline.make_video import FPS, make_video
from wanvideo_infinitetalk.wanvideo.modules import attention as modes
from wanvideo_infinitetalk.wanvideo.modules.backends import Backend, Contract, Device, register, unregister

FRAMES = 49
SPEECH = Path(str(files("wanvideo_infinitetalk").joinpath("assets", "speech.wav")))

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def followed(folder: Path, mode: str, quantization: str = "disabled") -> float:
    """The correlation of mouth and speech in a video of an unseen face."""
    scene = Scene.of(0)
    with speaking(scene, [SPEECH], folder, FRAMES / FPS) as job:
        job = replace(job, attention_mode=mode, attention_policy="uniform", quantization=quantization, device="cpu")
        result = make_video(replace(job, config=replace(job.config, frames=FRAMES)))
    speech = load_speech(*read_audio(SPEECH))[: FRAMES * 16_000 // FPS]
    (reading,) = read_video(frames_of(result.path), scene.image, scene.boxes, [speech], FRAMES, 9)
    return reading.correlation


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> float:
    return followed(tmp_path_factory.mktemp("exact"), "sdpa")


def test_a_right_mode_on_quantized_weights_keeps_the_mouth(exact: float, tmp_path: Path) -> None:
    assert exact > 0.9
    mode, quantization = "sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"
    assert exact - followed(tmp_path, mode, quantization) <= allowed_loss(mode, quantization)


WRONG: dict[str, Attention] = {
    "mean of V": lambda q, k, v: v.mean(1, keepdim=True).expand(q.shape).clone(),
    "the next head": lambda q, k, v: modes.attention(q, k.roll(1, 2), v, "eager"),
    "zeros": lambda q, k, v: torch.zeros_like(q),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_broken_mode_loses_the_mouth(
    wrong: str, exact: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite values and plausible frames, but more is lost than any mode is allowed to lose."""
    contract = Contract(dtypes=(torch.float32,), layout="any", device=Device(types=()))
    register(Backend("lying", contract, lambda inputs: WRONG[wrong](inputs.q, inputs.k, inputs.v)))
    monkeypatch.setitem(modes.MODE_BACKENDS, "sageattn_3_fp4", ("lying",))
    try:
        assert exact - followed(tmp_path, "sageattn_3_fp4") > 2 * allowed_loss("sageattn_3_fp4", "fp4_scaled")
    finally:
        unregister("lying")
