"""`infinitetalk demo` as a user runs it: in its own process, on what the package brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from wanvideo_infinitetalk.benchmarks.lipsync import correlation, lag, openings
from wanvideo_infinitetalk.cli import demo
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.audio import load_speech
from wanvideo_infinitetalk.pipeline.windows import plan_windows
from wanvideo_infinitetalk.tools.demo_model.rule import mouth_of

ASSETS = Path(demo.__file__).parents[1] / "assets"
MOUTH = [53.0, 74.0, 75.0, 93.0]
"""Left, top, right, bottom of the portrait's open mouth at the demo's size, pixels."""


@pytest.mark.slow
def test_the_demo_ends_in_a_video_with_sound_as_long_as_the_recording(tmp_path: Path) -> None:
    out = tmp_path / "demo.mp4"
    command = [sys.executable, "-m", "wanvideo_infinitetalk.cli", "demo", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"video: {out}"

    recording, rate = soundfile.read(ASSETS / "speech.wav")
    seconds = len(recording) / rate
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(out)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        sound_rate = container.streams.audio[0].rate
    assert abs(len(frames) / 25 - seconds) < 1 / 25
    assert abs(len(sound) / sound_rate - seconds) < 1 / 25
    assert np.stack(frames).std() > 5
    # The sound is the recording: both swell and fade together.
    at = np.arange(0, min(len(sound) / sound_rate, seconds) - 0.05, 0.05)
    loud = [
        [np.std(w[int(t * r) : int((t + 0.05) * r)]) for t in at] for w, r in ((sound, sound_rate), (recording, rate))
    ]
    assert np.corrcoef(loud)[0, 1] > 0.95

    assert frames[0].shape == (demo.SIZE, demo.SIZE, 3)
    # And she speaks it: her mouth opens and closes with the speech.
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1
    seen = openings(video[None], torch.tensor([[MOUTH]]))[0, 0]
    spoken = torch.from_numpy(mouth_of(load_speech(recording, rate), len(frames)).opening)
    assert correlation(seen[3:], spoken[3:]) > 0.9  # 0.97 when this was written
    assert abs(lag(seen[3:], spoken[3:])) <= 1


def test_the_command_makes_the_demo_on_any_set(
    tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same way in a smaller size, in one step and with random weights: quick, and no face to look at."""
    monkeypatch.setattr(demo, "SIZE", 32)
    monkeypatch.setattr(demo, "STEPS", 1)
    out = tmp_path / "demo.mp4"
    assert main(["demo", "--out", str(out), "--models", str(tiny_set.model.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"video: {out}"
    with av.open(str(out)) as container:
        assert container.streams.audio
        frames = sum(1 for _ in container.decode(video=0))
    info = soundfile.info(ASSETS / "speech.wav")
    assert abs(frames / 25 - info.duration) < 1 / 25


def test_the_demo_takes_several_windows() -> None:
    recording, rate = soundfile.read(ASSETS / "speech.wav")
    assert len(plan_windows(int(len(recording) / rate * 25), demo.FRAMES, demo.MOTION)) >= 2


def test_a_set_that_lies_in_the_folder_is_used_as_it_is(tiny_set: TinySet, tmp_path: Path) -> None:
    before = tiny_set.model.read_bytes()
    with demo.demo_job(tmp_path / "x.mp4", models=tiny_set.model.parent) as job:
        assert Path(job.files.model).read_bytes() == before


def test_the_demo_leaves_nothing_behind_but_can_keep_its_models(tmp_path: Path) -> None:
    with demo.demo_job(tmp_path / "x.mp4") as job:
        model = Path(job.files.model)
        assert model.exists()
    assert not model.exists()
    with demo.demo_job(tmp_path / "x.mp4", models=tmp_path / "kept"):
        pass
    assert (tmp_path / "kept" / model.name).exists()


def test_the_drawn_image_is_what_the_code_draws() -> None:
    from wanvideo_infinitetalk.assets.draw_portrait import draw_portrait

    drawn = np.asarray(draw_portrait()).astype(int)
    kept = np.asarray(Image.open(ASSETS / "portrait.png")).astype(int)
    # Pillow's versions round their blurs and resizes differently by a step or two.
    assert np.abs(drawn - kept).mean() < 1


def test_what_the_package_brings_is_small() -> None:
    assert (ASSETS / "speech.wav").stat().st_size <= 200_000
    assert (ASSETS / "portrait.png").stat().st_size <= 100_000
    info = soundfile.info(ASSETS / "speech.wav")
    assert (info.channels, info.subtype) == (1, "PCM_16")


@pytest.mark.parametrize("option", ["--attention-mode=flash_attn_9", "--device=toaster"])
def test_a_wrong_option_is_a_sentence(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "x.mp4"), option]) == 2
    assert capsys.readouterr().err.rstrip().splitlines()[-1].startswith("infinitetalk: There is no ")
