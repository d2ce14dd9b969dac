"""One video on several GPUs, here processes on the CPU: the numbers of one, and a sentence for whatever goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import split_work
from support.models import TINY, TINY_HUMO, random_model
from support.service_files import SETTINGS, WINDOWS, write_inputs
from support.split_work import Forward
from wanvideo_infinitetalk import assets
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import OutputFiles, VideoFrames
from wanvideo_infinitetalk.pipeline import processes
from wanvideo_infinitetalk.pipeline.journal import finished_windows
from wanvideo_infinitetalk.pipeline.loaded_models import LoadedModels
from wanvideo_infinitetalk.pipeline.make_video import Events, Job, make_video
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig
from wanvideo_infinitetalk.pipeline.processes import Processes, Work
from wanvideo_infinitetalk.pipeline.step_cache import EasyCache
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError
from wanvideo_infinitetalk.wanvideo.modules.techniques import NormalizedAttention
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings
from wanvideo_infinitetalk.wanvideo.runtime.parallel import Split, check_tokens

CPU = torch.device("cpu")
HUMO = dataclasses.replace(TINY, model_type="t2v", audio=None, humo=TINY_HUMO)


def children() -> list[multiprocessing.process.BaseProcess]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("GPU process")]


@contextlib.contextmanager
def together(size: int, work: Work, passes: int = 1, **more: Any) -> Iterator[Processes]:
    made = Processes([CPU] * size, passes, work, **more)
    try:
        yield made
    finally:
        made.close()


# ------------------------------------------------------------------------------------------------------- the numbers


def cases(heads: int) -> list[Forward]:
    config, humo = (dataclasses.replace(model, num_heads=heads) for model in (TINY, HUMO))
    away = torch.randn(5, config.text_dim, generator=torch.Generator().manual_seed(3))
    return [
        Forward(config, {}),
        Forward(config, {"speakers": 0}),
        Forward(config, {"speakers": 2, "grid": (3, 3, 5)}, {"audio_scale": 2.0}),
        Forward(config, {"speakers": 3, "grid": (2, 5, 3)}, {"enhance": 4.0}),
        Forward(config, {"grid": (1, 2, 3)}, {"nag": NormalizedAttention(away)}),
        Forward(config, {"grid": (4, 3, 3)}, {"skip_blocks": (0,)}),
        Forward(humo, {"grid": (3, 3, 5)}),
    ]


def check_forwards(several: Processes, configs: list[Forward]) -> None:
    """float32: 4e-7 measured, 2e-6 allowed."""
    found = several.call(("forwards", configs))
    for case, (alone, shared, copies) in zip(configs, found, strict=True):
        error = float((alone - shared).abs().max() / alone.abs().max())
        assert error < 2e-6, (case.given, error)
        assert copies == 0, (case.given, "the guards copy nothing")


def check_strips(several: Processes) -> None:
    """The demo's VAE on noise of 8 pixels: 45 dB of the range of frames measured, 40 allowed."""
    with as_file(files(assets) / "talking" / "vae.safetensors") as file:
        for whole, strips in several.call(("decoded", file)):
            assert strips.shape == whole.shape
            noise = float(((whole - strips) / 2).square().mean())
            assert noise < 1e-4, (whole.shape, noise)


def test_two_processes_give_the_numbers_of_one_and_fail_in_a_sentence() -> None:
    """In one pair, as their start takes seconds; also where the places of a frame cannot be divided evenly."""
    with together(2, split_work.work) as several:
        check_forwards(several, cases(2))
        check_strips(several)
        assert several.call(("misbehave", (0, "nothing"))) == "least 0"
        with pytest.raises(InputError, match=r"^On cpu number 1: There is no room for it\.$"):
            several.call(("misbehave", (1, "sentence")))
        assert not children()


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_more_processes_give_the_numbers_of_one(size: int) -> None:
    configs = cases(4)
    if size == 3:  # a width that six heads divide
        configs = [dataclasses.replace(c, config=dataclasses.replace(c.config, dim=96, num_heads=6)) for c in configs]
    with together(size, split_work.work) as several:
        check_forwards(several, configs)
        check_strips(several)


@pytest.mark.slow
def test_passes_and_tokens_are_divided_together() -> None:
    with together(4, split_work.work, passes=2) as several:
        check_forwards(several, cases(2))
        for scales, passes in (((5.0, 4.0), 3), ((1.0, 2.0), 2), ((1.0, 1.0), 1)):
            values, evaluated = several.call(("guided", scales))
            assert [float(value[0, 0]) for value in values] == list(range(passes))
            assert evaluated == (passes + 1) // 2, "every second one"


@pytest.mark.parametrize(("length", "size"), [(1560, 8), (7, 2), (5, 4), (3, 4)])
def test_shares_are_whole_and_even(length: int, size: int) -> None:
    counts = [Split(None, rank, size).counts(length) for rank in range(size)]  # type: ignore[arg-type]
    assert all(count == counts[0] for count in counts)
    assert sum(counts[0]) == length
    assert max(counts[0]) - min(counts[0]) <= 1


def test_what_cannot_be_divided_is_a_sentence() -> None:
    with pytest.raises(InputError, match="40 attention heads cannot be divided among 3 GPUs: use 2 or 4 or 5 or 8"):
        check_tokens(3, 40, 1560)
    with pytest.raises(InputError, match="4 tokens is too small for 8 GPUs"):
        check_tokens(8, 40, 4)
    check_tokens(8, 40, 1007)
    model = random_model()
    assert model.mesh.first
    assert model.mesh.tokens is None


# ----------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ((1, "SIGKILL"), r"The process of cpu number 1 was killed \(SIGKILL\)"),
        ((0, "SIGKILL"), r"The process of cpu number 0 was killed \(SIGKILL\)"),
        ((1, "SIGSTOP"), r"Nothing has come from .*cpu number 1 for 3 s: all processes were ended"),
        ((0, "sentence"), r"^There is no room for it\.$"),
        ((1, "error"), r"The process of cpu number 1 ended with code 1"),
    ],
    ids=lambda value: f"{value[1]} of {value[0]}" if isinstance(value, tuple) else "",
)
def test_what_becomes_of_one_ends_all_in_a_sentence(
    how: tuple[int, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE", 1.0)
    limit = 3.0 if how[1] == "SIGSTOP" else 120.0
    with together(2, split_work.work, time_limit=120.0) as several:
        assert several.call(("misbehave", (0, "nothing"))) == "least 0"
        several.time_limit = limit
        begin = time.monotonic()
        with pytest.raises(InfiniteTalkError, match=sentence):
            several.call(("misbehave", how))
        assert time.monotonic() - begin < 60
        assert not children()


# --------------------------------------------------------------------------------------------------------- videos


@pytest.fixture
def job(tiny_set: TinySet, tmp_path: Path) -> Job:
    inputs = write_inputs(tmp_path)
    config = {name: value for name, value in SETTINGS.items() if name != "max_frames"} | {"cfg": 3.0, "audio_cfg": 2.0}
    return Job(
        files=tiny_set.model_files,
        audio=(inputs["audio"],),
        image=inputs["image"],
        out=tmp_path / "video.mp4",
        config=GenerateConfig(**config),
        max_frames=SETTINGS["max_frames"],
        device="cpu",
    )


def pixels(path: str | Path) -> np.ndarray:
    frames = VideoFrames(path)
    return np.stack([np.asarray(frames[index], dtype=int) for index in range(len(frames))])


@pytest.mark.slow
@pytest.mark.parametrize("divided", [1, 2], ids=["tokens", "passes"])
def test_frames_are_those_of_one_process(job: Job, divided: int) -> None:
    """Before the video encoder, which makes much of little. One level of 255, on the average 0.005, allowed."""
    one = split_work.frames_of(lambda: make_video(job))
    with together(2, split_work.work, passes=divided) as several:
        job = dataclasses.replace(job, out=job.out.with_name("several.mp4"), gpus=2, guidance_gpus=divided)
        different = abs(several.call(("video", job)) - one)
    assert different.shape == one.shape
    assert different.max() <= 1
    assert different.mean() < 0.005


def test_processes_keep_their_models_from_one_video_to_the_next(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = make_video(job)
    stages: list[str] = []
    events = Events(stage=stages.append)
    loaded = LoadedModels()
    for number in range(2):
        out = tmp_path / f"several{number}.mp4"
        with caplog.at_level("INFO"):
            several = make_video(dataclasses.replace(job, out=out, gpus=2), events, loaded)
        assert (several.frames, several.width, several.height) == (one.frames, one.width, one.height)
        assert several.kernels
        assert several.guards.copies == 0
        assert np.abs(pixels(out) - pixels(one.path)).mean() < 1, "levels of 255"
    assert stages.count("Generating") == 2
    assert any("Still loaded: VAE, image encoder, model, prompts" in line for line in caplog.messages)
    loaded.clear()
    assert not children()


def test_a_run_that_lost_a_process_goes_on_with_another_number(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pixels(make_video(dataclasses.replace(job, out=job.out.with_name("whole.mp4"))).path)
    several = dataclasses.replace(job, gpus=2)

    def kill(done: int, windows: int) -> None:
        if done == 1:
            second = next(child for child in children() if child.name == "GPU process 1")
            os.kill(second.pid, signal.SIGKILL)

    with pytest.raises(InfiniteTalkError, match=r"SIGKILL.* finished windows are in .*\.partial\.mp4"):
        make_video(several, Events(window_done=kill))
    kept = finished_windows(OutputFiles.of(job.out))
    assert 1 <= kept < WINDOWS
    made: list[int] = []
    events = Events(window_done=lambda done, windows: made.append(done))
    make_video(dataclasses.replace(job, resume=True), events)
    assert made == list(range(kept + 1, WINDOWS + 1))
    assert np.abs(pixels(job.out) - whole).mean() < 1, "levels of 255, most of them the encoder's"


@pytest.mark.slow
def test_an_interruption_leaves_what_is_finished(job: Job) -> None:
    class Enough(Exception):
        pass

    announced: list[int] = []

    def check() -> None:
        if announced:
            raise Enough

    events = Events(window_done=lambda done, windows: announced.append(done), check_interrupt=check)
    with pytest.raises(Enough):
        make_video(dataclasses.replace(job, gpus=2), events)
    assert finished_windows(OutputFiles.of(job.out)) >= announced[0]
    assert not OutputFiles.of(job.out).lock.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus": 3}, "2 attention heads cannot be divided among 3 GPUs"),
        ({"gpus": 4, "guidance_gpus": 3}, "3 GPUs for the passes do not divide 4"),
        ({"guidance_gpus": 2}, "2 GPUs for the passes do not divide 1"),
        ({"gpus": 2, "compile_settings": CompileSettings()}, "A compiled model runs on one GPU"),
        ({"gpus": 0}, "gpus 0 cannot be used"),
        ({"gpus": 2, "guidance_gpus": 2, "config": {"techniques": (EasyCache(),)}}, "A step cache decides"),
    ],
    ids=["heads", "passes", "passes of one", "compiled", "none", "cache"],
)
def test_settings_that_do_not_go_together_are_rejected(job: Job, changes: dict[str, Any], sentence: str) -> None:
    if "config" in changes:
        changes = {**changes, "config": dataclasses.replace(job.config, **changes["config"])}
    with pytest.raises(InputError, match=sentence):
        make_video(dataclasses.replace(job, **changes))
    assert not OutputFiles.of(job.out).partial.exists()
