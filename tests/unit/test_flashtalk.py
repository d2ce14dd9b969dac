"""FlashTalk from files to a video file, on the tiny models of the random set."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
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
from wanvideo_infinitetalk.media.video import OutputFiles, VideoFrames
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.flashtalk import SAMPLES_A_FRAME, SpeechRing, SpeechRows, with_silence_around
from wanvideo_infinitetalk.pipeline.long_video import FinishedWindow, generate
from wanvideo_infinitetalk.pipeline.make_video import Events, Job, make_video
from wanvideo_infinitetalk.pipeline.plan import RING_FRAMES, GenerateConfig, mode_by_name, plan_video
from wanvideo_infinitetalk.pipeline.presets import FLASHTALK_14B, build_job, mode_defaults
from wanvideo_infinitetalk.pipeline.recorder import Recorder
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import inspect_dit
from wanvideo_infinitetalk.wanvideo.checkpoints.lora import LoraSpec
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError

NEW = 8
CONFIG = GenerateConfig(mode="flashtalk", **FLASHTALK_14B | {"width": 64, "height": 48, "frames": 13, "steps": 2})
SAMPLES = 12_000
"""18 whole frames, and three windows of 8 new ones."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flashtalk")
    made = {name: folder / f"{name}.wav" for name in ("speech", "changed", "silent", "short")}
    speech = np.random.default_rng(0).normal(size=SAMPLES).astype(np.float32) * 0.1
    changed = speech.copy()
    changed[NEW * SAMPLES_A_FRAME :] *= -0.5
    for name, wave in (("speech", speech), ("changed", changed), ("silent", 0 * speech), ("short", speech[:600])):
        soundfile.write(made[name], wave, 16_000)
    made["image"] = folder / "face.png"
    pixels = np.random.default_rng(1).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made["image"])
    return made


@pytest.fixture
def job(tiny_set: TinySet, inputs: dict[str, Path], tmp_path: Path) -> Job:
    files = tiny_set.flashtalk_files
    return Job(files, (inputs["speech"],), tmp_path / "v.mp4", image=inputs["image"], config=CONFIG)


def windows_of(job: Job, events: Events | None = None) -> list[torch.Tensor]:
    """The frames of each window, as the video encoder is given them."""
    seen: list[torch.Tensor] = []
    add = Recorder.add

    def kept(self: Recorder, window: FinishedWindow) -> None:
        seen.append(window.frames)
        add(self, window)

    with mock.patch.object(Recorder, "add", kept):
        result = make_video(job, events)
    assert result.guards.copies == 0
    assert len(VideoFrames(result.path)) == result.frames
    return seen


def test_the_video_lasts_as_long_as_the_recording(job: Job) -> None:
    windows = windows_of(job)
    assert [len(frames) for frames in windows] == [NEW, NEW, 2]
    assert all(frames.float().std() > 1 for frames in windows)
    again = windows_of(replace(job, config=replace(CONFIG, speech_encoding="stream")))
    assert all(torch.equal(one, other) for one, other in zip(windows, again, strict=True))
    assert [len(frames) for frames in windows_of(replace(job, max_frames=9))] == [NEW, 1]


def test_a_stream_knows_nothing_of_later_speech(job: Job, inputs: dict[str, Path]) -> None:
    for encoding, knows in (("stream", False), ("once", True)):
        one = replace(job, config=replace(CONFIG, speech_encoding=encoding))
        windows, others = windows_of(one), windows_of(replace(one, audio=(inputs["changed"],)))
        assert torch.equal(windows[0], others[0]) != knows
        assert not torch.equal(windows[1], others[1])


def test_a_run_goes_on_where_it_was_stopped(job: Job) -> None:
    whole = windows_of(replace(job, out=Path(job.out).with_name("whole.mp4")))

    def stop(done: int, windows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_video(job, Events(window_done=stop))
    assert OutputFiles.of(job.out).journal.is_file()
    rest = windows_of(replace(job, resume=True))
    assert 0 < len(rest) < len(whole)
    for one, other in zip(whole[-len(rest) :], rest, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(KeyboardInterrupt):
        make_video(job, Events(window_done=stop))
    once = replace(job, resume=True, config=replace(CONFIG, speech_encoding="once"))
    with pytest.raises(InputError, match="speech encoding once, was None"):
        make_video(once)


def test_silence_is_a_recording(job: Job, inputs: dict[str, Path]) -> None:
    assert sum(map(len, windows_of(replace(job, audio=(inputs["silent"],))))) == SAMPLES // SAMPLES_A_FRAME


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an adapter": ({"adapter": "adapter"}, "leave out the adapter infinitetalk-tiny.safetensors"),
    "two speakers": ({"audio": ("speech", "speech")}, "has one speaker, not 2"),
    "a mask": ({"masks": ("image",)}, "give no masks"),
    "a recording without a frame": ({"audio": ("short",)}, "too short"),
    "no recording": ({"audio": ()}, "Give a recording"),
    "a source video": ({"image": None, "video": "image"}, "animates an image, not a source video"),
    "references": ({"references": ("image",)}, "in the mode humo alone"),
    "pieces of a prompt": ({"prompt": "a | b"}, "has one prompt"),
    "a model without audio layers": ({"model": "model"}, "has no audio layers, which FlashTalk's has"),
    "an adapter as the model": ({"model": "adapter"}, "is an InfiniteTalk adapter"),
    "a VAE as the model": ({"model": "vae"}, "is a Wan2.1 VAE"),
    "HuMo as the model": ({"model": "humo"}, "is HuMo: choose the mode humo"),
    "guidance": ({"cfg": 5.0}, "set cfg and audio_cfg to 1"),
    "guidance of one step": ({"audio_cfg": [1.0, 2.0]}, "set cfg and audio_cfg to 1"),
    "a start step": ({"start_step": 1}, "begins from noise alone"),
    "a window above 8 s": ({"frames": RING_FRAMES + 1}, "longer than the 200"),
    "an unknown encoding": ({"speech_encoding": "twice"}, "choose stream or once"),
    "a stream of InfiniteTalk": ({"mode": "infinitetalk", "speech_encoding": "stream"}, "choose once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_before_weights_are_read(
    tiny_set: TinySet, inputs: dict[str, Path], job: Job, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("wanvideo_infinitetalk.pipeline.make_video.load_dit", lambda *_, **__: pytest.fail("read"))
    changes, words = WRONG[case]
    files = {name: getattr(tiny_set, value) for name, value in changes.items() if name in vars(job.files)}
    config = {name: value for name, value in changes.items() if name in vars(CONFIG)}
    own = {name: value for name, value in changes.items() if name not in files and name not in config}
    for name, value in own.items():
        if name in ("audio", "masks", "references"):
            own[name] = tuple(inputs[item] for item in value)
        elif name in ("image", "video") and value:
            own[name] = inputs[value]
    job = replace(job, files=replace(job.files, **files), config=replace(CONFIG, **config), **own)
    with pytest.raises(InfiniteTalkError) as caught:
        make_video(job)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(job.out).exists()


def test_a_lora_on_top_is_warned_of(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InfiniteTalkError):
        make_video(replace(job, loras=(LoraSpec(tmp_path / "missing.safetensors"),)))
    assert "distilled to few steps already" in caplog.text


def test_a_name_is_a_hint_and_no_proof(job: Job, tiny_set: TinySet, caplog: pytest.LogCaptureFixture) -> None:
    assert mode_by_name(tiny_set.flashtalk) == "flashtalk"
    assert mode_by_name("models/SoulX-FlashTalk-14B") == "flashtalk"
    with caplog.at_level(logging.WARNING):
        make_video(replace(job, config=replace(CONFIG, mode="infinitetalk", color_method="reinhard"), max_frames=5))
    assert "flashtalk-tiny is for mode flashtalk by its name" in caplog.text


def test_one_file_in_diffusers_name_stands_for_its_folder(tiny_set: TinySet, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(tiny_set.vae, tmp_path / "Wan2.1_VAE.safetensors")
    with pytest.raises(InfiniteTalkError, match="is a folder"):
        inspect_dit(tmp_path)
    shutil.copy(tiny_set.model, tmp_path / "diffusion_pytorch_model.safetensors")
    assert inspect_dit(tmp_path) == inspect_dit(tiny_set.model)


def test_settings_of_the_mode_and_the_preset(tiny_set: TinySet) -> None:
    assert mode_defaults("flashtalk", tiny_set.flashtalk) == FLASHTALK_14B
    needed = {"files": tiny_set.flashtalk_files, "audio": (), "out": "v.mp4"}
    defaults = mode_defaults(None, tiny_set.flashtalk, "stream")
    of_preset = build_job(needed, "stream", defaults).config
    assert of_preset == build_job(needed | {"mode": "flashtalk"}, None, FLASHTALK_14B).config
    assert (of_preset.width, of_preset.height, of_preset.mode) == (448, 768, "flashtalk")
    wide = build_job(needed | {"width": 640}, "stream", defaults).config
    assert (wide.width, wide.height) == (640, None)


# --- speech --------------------------------------------------------------------------------------------------------


class LoudnessPerFrame:
    """Features that are the mean of the samples of each video frame."""

    layers, hidden_size = 1, 1

    def __call__(self, waveform: np.ndarray, num_frames: int | None = None) -> torch.Tensor:
        assert num_frames in (None, len(waveform) // SAMPLES_A_FRAME)
        frames = waveform[: len(waveform) // SAMPLES_A_FRAME * SAMPLES_A_FRAME].reshape(-1, SAMPLES_A_FRAME)
        return torch.from_numpy(frames.mean(1))[:, None, None]


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], np.ndarray]:
    """Speech in which every sample of frame j is j + 1, left as loud as it is."""
    monkeypatch.setattr("wanvideo_infinitetalk.pipeline.flashtalk.normalize_loudness", lambda wave: wave)
    return lambda frames: np.repeat(np.arange(1, frames + 1, dtype=np.float32), SAMPLES_A_FRAME)


def test_frames_are_given_the_speech_of_their_time(numbered: Callable[[int], np.ndarray]) -> None:
    """Of both encodings; a stream repeats its last row where it would need later ones."""
    frames, total, lead = 13, 300, 5
    plan = plan_video(replace(CONFIG, frames=frames), (64, 48), [total])
    ring = SpeechRing(LoudnessPerFrame(), numbered(total))  # type: ignore[arg-type]
    end = plan.windows[-1].end
    rows = SpeechRows(LoudnessPerFrame()(with_silence_around(numbered(total), lead, end)), lead)
    for window in plan.windows:
        wanted = torch.tensor([[f + w for w in range(-2, 3)] for f in range(window.start, window.end)])
        known = wanted.clamp(max=window.end - 1)
        for speech, at in ((ring, known), (rows, wanted.clamp(min=-lead, max=end - 1))):
            spoken = torch.where((at >= 0) & (at < total), at + 1, 0).float()
            assert torch.equal(speech(window)[0, :, :, 0, 0], spoken), window.index


def test_speech_may_come_in_pieces(numbered: Callable[[int], np.ndarray]) -> None:
    total = 2 * RING_FRAMES
    whole = SpeechRing(LoudnessPerFrame(), numbered(total))  # type: ignore[arg-type]
    pieces, rest = SpeechRing(LoudnessPerFrame()), numbered(total)  # type: ignore[arg-type]
    for window in plan_video(CONFIG, (64, 48), [total]).windows:
        while pieces.received < min(window.end, total) * SAMPLES_A_FRAME:
            pieces.append(rest[:1000])
            rest = rest[1000:]
        assert torch.equal(pieces(window), whole(window))
        assert len(pieces._samples) <= RING_FRAMES * SAMPLES_A_FRAME + 1000  # memory stays flat


def test_one_image_is_the_condition_of_all_windows(inputs: dict[str, Path]) -> None:
    plan = plan_video(CONFIG, (64, 48), [NEW])
    speech = SpeechRows(torch.zeros(20, 2, 3), 5)
    context = torch.zeros(1, 4)
    images = [np.zeros((48, 64, 3), np.uint8)] * 2
    with pytest.raises(InputError, match="takes one image, not 2"):
        generate(mock.Mock(), mock.Mock(), None, Conditioning([context], context, speech, images), plan)
    with pytest.raises(InputError, match="has one prompt for the whole video, not 2"):
        generate(mock.Mock(), mock.Mock(), None, Conditioning([context] * 2, context, speech, images), plan)
