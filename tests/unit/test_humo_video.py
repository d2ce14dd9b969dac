"""HuMo from files to a video file, on the tiny models of the random set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.pipeline.guidance import Pass
from wanvideo_infinitetalk.pipeline.humo import guide_humo, plan_humo
from wanvideo_infinitetalk.pipeline.long_video import FinishedWindow
from wanvideo_infinitetalk.pipeline.make_video import Job, make_video
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
from wanvideo_infinitetalk.pipeline.presets import HUMO_1_7B, HUMO_17B, mode_defaults
from wanvideo_infinitetalk.pipeline.recorder import Recorder
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError

CONFIG = GenerateConfig(mode="humo", width=64, height=48, steps=2, shift=5.0, scheduler="unipc", cfg=5.0, audio_cfg=5.5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recording of 0.7 s, and two images of other sizes than the video."""
    folder = tmp_path_factory.mktemp("humo")
    made = {name: folder / f"{name}.png" for name in ("wide", "tall")}
    for name, size in (("wide", (90, 30)), ("tall", (20, 70))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made[name])
    made["speech"] = folder / "speech.wav"
    soundfile.write(made["speech"], np.random.default_rng(0).normal(size=11_500) * 0.1, 16_000)
    return made


def job_of(tiny: TinySet, out: Path, *, small: bool = False, **changes: Any) -> Job:
    return Job(files=tiny.humo_files(small), audio=(), out=out, config=CONFIG, max_frames=9, **changes)


def frames_of(job: Job) -> torch.Tensor:
    """The frames that the video encoder is given, which may encode equal ones differently."""
    seen: list[torch.Tensor] = []
    add = Recorder.add

    def kept(self: Recorder, window: FinishedWindow) -> None:
        seen.append(window.frames)
        add(self, window)

    with mock.patch.object(Recorder, "add", kept):
        result = make_video(job)
    assert result.guards.copies == 0
    (frames,) = seen
    assert frames.shape == (result.frames, 48, 64, 3)
    assert len(VideoFrames(result.path)) == result.frames
    return frames


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("speaks", "references"), [(False, 0), (False, 2), (True, 0), (True, 1)])
def test_text_with_images_with_speech_and_with_both(
    tiny_set: TinySet, inputs: dict[str, Path], tmp_path: Path, small: bool, speaks: bool, references: int
) -> None:
    images = (inputs["wide"], inputs["tall"])[:references]
    given = {"audio": (inputs["speech"],) if speaks else (), "references": images}
    job = replace(job_of(tiny_set, tmp_path / "v.mp4", small=small), **given)
    frames = frames_of(job)
    assert len(frames) == 9
    assert frames.float().std() > 1
    again = frames_of(replace(job, out=tmp_path / "again.mp4"))
    assert torch.equal(frames, again)
    if speaks or references:
        other = frames_of(replace(job_of(tiny_set, tmp_path / "other.mp4", small=small), audio=(), references=()))
        assert not torch.equal(frames, other)


@pytest.mark.parametrize("mode", ["sdpa", "sageattn_3_fp8", "sageattn_3_fp4"])
@pytest.mark.parametrize("quantization", ["disabled", "fp8_e4m3fn_scaled_fast", "fp4_scaled"])
def test_modes_and_quantizations(
    tiny_set: TinySet, inputs: dict[str, Path], tmp_path: Path, mode: str, quantization: str
) -> None:
    job = job_of(tiny_set, tmp_path / "v.mp4", attention_mode=mode, quantization=quantization)
    job = replace(job, audio=(inputs["speech"],), references=(inputs["wide"],), max_frames=5)
    frames = frames_of(job)
    assert torch.equal(frames, frames_of(replace(job, out=tmp_path / "again.mp4", blocks_to_swap=1)))


def test_the_video_is_as_long_as_the_recording(tiny_set: TinySet, inputs: dict[str, Path], tmp_path: Path) -> None:
    job = replace(job_of(tiny_set, tmp_path / "v.mp4"), audio=(inputs["speech"],), max_frames=None)
    assert make_video(job).frames == 17  # 11,500 samples are 17 frames, which are 4n + 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"image": "wide"}, "HuMo takes neither image nor source video"),
    "masks": ({"masks": ("wide",)}, "HuMo takes no masks"),
    "two recordings": ({"audio": ("speech", "speech")}, "one recording, not 2"),
    "no whisper": ({"audio": ("speech",), "whisper": None}, "give the encoder of whisper-large-v3"),
    "a text encoder as whisper": ({"audio": ("speech",), "whisper": "text_encoder"}, "is a T5 text encoder"),
    "wav2vec as whisper": ({"audio": ("speech",), "whisper": "wav2vec_file"}, "is a wav2vec2 model"),
    "InfiniteTalk as HuMo": ({"model": "model"}, "is not HuMo"),
    "HuMo as InfiniteTalk": ({"mode": "infinitetalk"}, "is HuMo: choose the mode humo"),
    "pieces of a prompt": ({"prompt": "a | b"}, "HuMo makes one window"),
    "a start step": ({"start_step": 1}, "begins from noise alone"),
    "an image that is none": ({"references": ("speech",)}, "speech.wav"),
    "no frame": ({"audio": ("speech",), "max_frames": 0}, "max_frames 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_before_weights_are_read(
    tiny_set: TinySet, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("wanvideo_infinitetalk.pipeline.make_video.load_dit", lambda *_, **__: pytest.fail("read"))
    changes, words = WRONG[case]
    job = job_of(tiny_set, tmp_path / "v.mp4")
    files = {k: None if v is None else getattr(tiny_set, v) for k, v in changes.items() if k in vars(job.files)}
    config = {k: v for k, v in changes.items() if k in vars(CONFIG)}
    own = {k: v for k, v in changes.items() if k not in files and k not in config}
    for name, value in own.items():
        if name in ("audio", "masks", "references"):
            own[name] = tuple(inputs[item] for item in value)
        elif name == "image":
            own[name] = inputs[value]
    job = replace(job, files=replace(job.files, **files), config=replace(CONFIG, **config), **own)
    with pytest.raises(InfiniteTalkError) as caught:
        make_video(job)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v.mp4").exists()


def test_reference_images_are_humos_alone(tiny_set: TinySet, inputs: dict[str, Path], tmp_path: Path) -> None:
    files = tiny_set.model_files
    job = Job(files, (inputs["speech"],), tmp_path / "v.mp4", image=inputs["wide"], references=(inputs["tall"],))
    with pytest.raises(InfiniteTalkError, match="read in the mode humo alone"):
        make_video(job)


def test_the_public_settings_are_those_of_each_model(tiny_set: TinySet) -> None:
    assert mode_defaults("humo", tiny_set.humo) == HUMO_17B
    assert mode_defaults("humo", tiny_set.humo_small) == HUMO_1_7B
    assert mode_defaults("infinitetalk", tiny_set.model) == {}
    assert mode_defaults(None, tiny_set.humo) == {}


def test_steps_without_guidance_take_few_passes() -> None:
    config = replace(CONFIG, cfg=[5.0, 1.0], audio_cfg=[5.5, 1.0])
    plan = plan_humo(config, 17, 1, channels=True)
    assert [len(formula.passes) for formula in plan.schedule.formulas] == [3, 1]
    plan = plan_humo(replace(config, cfg=1.0, audio_cfg=5.5), 17, 1, channels=True)
    assert [formula.passes for formula in plan.schedule.formulas] == [(Pass(True, True), Pass(True, False))] * 2
    assert plan.config.color_correction == 0
    late = guide_humo(5.0, 5.5, 1.0, 980, channels=True, references=True)
    early = guide_humo(5.0, 5.5, 1.0, 981, channels=True, references=True)
    assert early.base.references
    assert not late.base.references
