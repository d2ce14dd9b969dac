"""Videos that are handed out window by window: the same as files, when their speech is there, to whoever reads."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.audio import SpeechStream, load_speech
from wanvideo_infinitetalk.media.video import StreamWriter
from wanvideo_infinitetalk.pipeline.flashtalk import SAMPLES_A_FRAME
from wanvideo_infinitetalk.pipeline.loaded_models import LoadedModels
from wanvideo_infinitetalk.pipeline.long_video import FinishedWindow
from wanvideo_infinitetalk.pipeline.make_video import NO_FILE, Events, Job, make_video
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
from wanvideo_infinitetalk.pipeline.presets import FLASHTALK_14B
from wanvideo_infinitetalk.pipeline.recorder import Recorder
from wanvideo_infinitetalk.pipeline.stream import StreamedWindow, StreamRecorder, generate_stream, stream_video
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError

NEW = 8
CONFIG = GenerateConfig(mode="flashtalk", **FLASHTALK_14B | {"width": 32, "height": 32, "frames": 13, "steps": 1})
SPEECH = np.random.default_rng(0).normal(size=26 * SAMPLES_A_FRAME + 100).astype(np.float32) * 0.1
"""26 frames and a bit: three windows of 8 new ones, and one of 2."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModels:
    return LoadedModels()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    soundfile.write(folder / "speech.wav", SPEECH, 16_000, "FLOAT")
    pixels = np.random.default_rng(1).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "face.png")
    return folder


@pytest.fixture
def live(tiny_set: TinySet, folder: Path) -> Job:
    return Job(tiny_set.flashtalk_files, (), NO_FILE, image=folder / "face.png", config=CONFIG)


@pytest.fixture
def recorded(live: Job, folder: Path) -> Job:
    return replace(live, audio=(folder / "speech.wav",))


def pieces(wave: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Of random sizes, some of them empty."""
    rng, done = random.Random(seed), 0
    while done < len(wave):
        size = rng.choice((0, 1, 7, 500, SAMPLES_A_FRAME, 3000, 9000))
        yield wave[done : done + size]
        done += size


def joined(windows: list[StreamedWindow]) -> tuple[torch.Tensor, np.ndarray]:
    return torch.cat([w.frames for w in windows]), np.concatenate([w.sound for w in windows])


def frames_of_file(job: Job) -> torch.Tensor:
    """The frames that the video encoder is given."""
    seen: list[torch.Tensor] = []
    add = Recorder.add

    def kept(self: Recorder, window: FinishedWindow) -> None:
        seen.append(window.frames)
        add(self, window)

    with mock.patch.object(Recorder, "add", kept):
        make_video(job)
    return torch.cat(seen)


# --- the windows ---------------------------------------------------------------------------------------------------


def test_pieces_of_any_sizes_make_the_video_of_the_recording(
    live: Job, recorded: Job, loaded: LoadedModels, tmp_path: Path
) -> None:
    expected = frames_of_file(replace(recorded, out=tmp_path / "v.mp4"))
    whole = list(stream_video(recorded, None, loaded))
    assert [(w.index, w.count, len(w.frames)) for w in whole] == [(0, 4, 8), (1, 4, 8), (2, 4, 8), (3, 4, 2)]
    frames, sound = joined(whole)
    assert torch.equal(frames, expected)
    assert np.array_equal(sound, SPEECH)
    assert all(len(w.sound) == len(w.frames) * SAMPLES_A_FRAME for w in whole[:-1])
    for seed in range(2):
        windows = list(generate_stream(pieces(SPEECH, seed), live, 16_000, None, loaded))
        assert [w.count for w in windows] == [0] * 4
        frames, sound = joined(windows)
        assert torch.equal(frames, expected), seed
        assert np.array_equal(sound, SPEECH)
    ended = list(generate_stream(pieces(SPEECH, 0), replace(live, max_frames=11), 16_000, None, loaded))
    limited = list(stream_video(replace(recorded, max_frames=11), None, loaded))
    assert torch.equal(joined(ended)[0], joined(limited)[0])
    assert len(joined(ended)[0]) == 11


def test_other_rates_and_channels(live: Job, loaded: LoadedModels) -> None:
    rate = 44_100
    tone = np.sin(2 * np.pi * 300 * np.arange(int(0.7 * rate)) / rate).astype(np.float32) * 0.2
    expected, sound = joined(list(generate_stream([tone], live, rate, None, loaded)))
    assert len(expected) == 17
    frames, again = joined(list(generate_stream(pieces(tone, 1), live, rate, None, loaded)))
    assert torch.equal(frames, expected)
    assert np.array_equal(again, sound)
    stereo = [torch.from_numpy(np.stack([piece, piece])) for piece in pieces(tone, 2)]
    assert torch.equal(joined(list(generate_stream(stereo, live, rate, None, loaded)))[0], expected)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_in_pieces_is_that_of_the_whole(rate: int) -> None:
    wave = np.random.default_rng(0).normal(size=rate).astype(np.float32) * 0.1
    stream = SpeechStream(rate)
    parts = [stream.resample(stream.mono(piece)) for piece in pieces(wave, 3)]
    parts.append(stream.resample(np.zeros(0, np.float32), last=True))
    whole = load_speech(wave, rate, target_lufs=None)
    assert len(whole) == sum(map(len, parts)) == 16_000
    assert float(np.abs(np.concatenate(parts) - whole).max()) < 1e-6


def test_a_window_waits_for_its_own_speech_and_no_more(live: Job, loaded: LoadedModels) -> None:
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for begin in range(0, len(SPEECH), SAMPLES_A_FRAME):
            taken += 1
            yield SPEECH[begin : begin + SAMPLES_A_FRAME]

    stream = generate_stream(frames(), live, 16_000, None, loaded)
    assert taken == 0
    for index in range(3):
        assert next(stream).index == index
        assert taken == (index + 1) * NEW
    assert len(next(stream).frames) == 2
    assert list(stream) == []


def test_who_does_not_ask_holds_the_work_up_and_keeps_his_settings(live: Job, loaded: LoadedModels) -> None:
    steps: list[int] = []
    events = Events(step=lambda window, windows, step, of: steps.append(window))
    stream = generate_stream(pieces(SPEECH, 0), live, 16_000, events, loaded)
    assert steps == []
    next(stream)
    assert steps == [0]
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).requires_grad
    next(stream)
    assert steps == [0, 1]
    stream.close()  # type: ignore[attr-defined]
    assert steps == [0, 1]


@pytest.mark.parametrize("mode", ["infinitetalk", "humo"])
def test_other_modes_stream_their_recordings(tiny_set: TinySet, folder: Path, tmp_path: Path, mode: str) -> None:
    small = {"width": 32, "height": 32, "steps": 1, "cfg": 1.0, "audio_cfg": 1.0}
    config = GenerateConfig(mode=mode, frames=9, motion_frames=1, **small)
    if mode == "humo":
        job = Job(tiny_set.humo_files(), (), NO_FILE, config=config, max_frames=5)
    else:
        job = Job(tiny_set.model_files, (folder / "speech.wav",), NO_FILE, image=folder / "face.png", config=config)
        job = replace(job, max_frames=12)
    windows = list(stream_video(job))
    assert torch.equal(torch.cat([w.frames for w in windows]), frames_of_file(replace(job, out=tmp_path / "v.mp4")))
    assert [w.sound is None for w in windows] == ([True] if mode == "humo" else [False, False])


def bad(**changes: Any) -> dict[str, Any]:
    return changes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a recording": (bad(audio=("speech.wav",)), "leave the recordings out"),
    "whole recordings": (bad(config=replace(CONFIG, speech_encoding="once")), "reads whole recordings"),
    "another mode": (bad(config=GenerateConfig()), "choose flashtalk"),
    "a file": (bad(out="v.mp4"), "written to no file"),
    "going on": (bad(resume=True), "leave resume out"),
    "a comment": (bad(comment="made"), "carries no comment"),
    "GPUs": (bad(gpus=2), "computed on one GPU"),
    "an image that is missing": (bad(image="missing.png"), "missing.png"),
    "no rate of speech": (bad(rate=100), "states 100 samples a second"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_at_once(live: Job, case: str) -> None:
    changes, words = WRONG[case]
    rate = changes.get("rate", 16_000)
    job = replace(live, **{name: value for name, value in changes.items() if name != "rate"})
    with pytest.raises(InfiniteTalkError) as caught:
        generate_stream(iter([]), job, rate)
    assert words in str(caught.value)


CHUNKS: dict[str, tuple[list[np.ndarray], str]] = {
    "none": ([], "shorter than one video frame"),
    "less than a frame": ([SPEECH[:600]], "shorter than one video frame"),
    "NaN": ([SPEECH[:6000] * np.nan], "NaN or infinite"),
    "integers": ([np.zeros(100, np.int16)], "divide by its largest value"),
    "far too loud": ([SPEECH[:6000] * 1e6], "lie within -1 and 1"),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_speech_that_is_none_is_said_in_one_sentence(live: Job, loaded: LoadedModels, case: str) -> None:
    chunks, words = CHUNKS[case]
    with pytest.raises(InputError) as caught:
        next(generate_stream(chunks, live, 16_000, None, loaded))
    assert words in str(caught.value)
    assert not torch.is_inference_mode_enabled()


def test_a_stream_is_no_file(recorded: Job) -> None:
    with pytest.raises(InputError, match="would be no file"):
        make_video(recorded)


# --- the bytes -----------------------------------------------------------------------------------------------------


def read(data: bytes) -> tuple[list[float], np.ndarray]:
    """When each image is shown, in frames, and the sound at 48 kHz."""
    with av.open(io.BytesIO(data), format="mp4") as container:
        times = [float(frame.pts * frame.time_base * 25) for frame in container.decode(video=0)]
    with av.open(io.BytesIO(data), format="mp4") as container:
        if not container.streams.audio:
            return times, np.zeros(0)
        return times, np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def test_what_is_written_plays_at_any_time() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000 * 2) / 48_000).astype(np.float32) * 0.3
    file, sizes, done = io.BytesIO(), (28, 2, 20), 0
    writer = StreamWriter(file)
    for size in sizes:
        writer.append(torch.rand(size, 48, 64, 3), tone[done * 1920 : (done + size) * 1920], 48_000)
        done += size
        times, _ = read(file.getvalue())
        assert times == list(range(done))
    before = file.getvalue()
    writer.close()
    assert file.getvalue().startswith(before)
    assert before.count(b"moov") == 1  # one header
    times, sound = read(file.getvalue())
    assert times == list(range(50))
    assert len(sound) >= 48_000 * 2
    middle = sound[40_000:50_000]
    errors = [np.abs(middle - tone[40_000 - late : 50_000 - late]).mean() for late in range(990, 1060)]
    assert 990 + int(np.argmin(errors)) == 1024  # what the encoder holds back; a period of the tone is 109
    assert min(errors) < 0.01


def test_streams_without_sound_and_changes_of_it() -> None:
    file = io.BytesIO()
    writer = StreamWriter(file)
    writer.append(torch.rand(4, 32, 32, 3))
    with pytest.raises(InputError, match="or none"):
        writer.append(torch.rand(4, 32, 32, 3), np.zeros(100, np.float32), 48_000)
    writer.close()
    times, sound = read(file.getvalue())
    assert (len(times), len(sound)) == (4, 0)
    heard = StreamWriter(io.BytesIO())
    heard.append(torch.rand(4, 32, 32, 3), np.zeros(7680, np.float32), 48_000)
    with pytest.raises(InputError, match="The sound changes from 1 channels at 48000 Hz to 1 at 44100"):
        heard.append(torch.rand(4, 32, 32, 3), np.zeros(7680, np.float32), 44_100)


def window(index: int) -> StreamedWindow:
    return StreamedWindow(index, 9, torch.rand(4, 32, 32, 3), None, None)


def test_a_reader_who_stops_reading_holds_the_work_up() -> None:
    go_on, entered = threading.Event(), threading.Event()

    class Held(io.BytesIO):
        def write(self, data: Any) -> int:
            entered.set()
            assert go_on.wait(60)
            return super().write(data)

    added: list[int] = []
    file = Held()

    def add() -> None:
        with StreamRecorder(StreamWriter(file)) as recorder:
            for index in range(5):
                recorder.add(window(index))
                added.append(index)

    thread = threading.Thread(target=add)
    thread.start()
    assert entered.wait(60)
    thread.join(1)
    assert added == [0, 1]  # one is written, one waits
    go_on.set()
    thread.join(60)
    assert added == [0, 1, 2, 3, 4]
    assert len(read(file.getvalue())[0]) == 20


def test_a_reader_who_is_gone_ends_the_work_in_one_sentence() -> None:
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=0) as file, contextlib.ExitStack() as stack:
        recorder = stack.enter_context(StreamRecorder(StreamWriter(file)))
        os.close(reading)
        with pytest.raises(InfiniteTalkError, match="reader has closed it, after 0 frames"):
            deque(map(recorder.add, map(window, range(50))))
        stack.pop_all()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_set: TinySet, folder: Path) -> list[str]:
    files = {name: value for name, value in vars(tiny_set.flashtalk_files).items() if value is not None}
    options = [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", str(path))]
    options += ["--mode", "flashtalk", "--image", str(folder / "face.png"), "--audio", str(folder / "speech.wav")]
    return ["generate", *options, "--width", "32", "--height", "32", "--frames", "13", "--steps", "1"]


def test_the_command_writes_to_stdout_and_nothing_else_there(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = [sys.executable, "-m", "wanvideo_infinitetalk.cli", *command, "--out", "-"]
    done = subprocess.run(run, capture_output=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    times, sound = read(done.stdout)
    assert times == list(range(26))
    assert len(sound) / 48_000 == pytest.approx(len(SPEECH) / 16_000, abs=0.07)
    assert b"26 frames in" in done.stderr

    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as stdout:
        done = subprocess.run(run, stdout=stdout, stderr=subprocess.PIPE, env=environment, timeout=300, check=False)
    assert done.returncode == 2
    last = done.stderr.decode().strip().splitlines()[-1]
    assert last == "infinitetalk: The stream's reader has closed it, after 0 frames (0.0 s)."
    assert b"Traceback" not in done.stderr


def test_the_command_keeps_nothing_to_go_on_with(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--out", "-", "--resume"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert "leave resume out" in said.err


def test_no_video_is_written_to_a_terminal(
    command: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*command, "--out", "-"]) == 2
    assert "lead it into a player, or name a file" in capfd.readouterr().err
