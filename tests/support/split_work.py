"""What the processes of tests/unit/test_several_gpus.py do; they are started afresh and find it by its name."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from wanvideo_infinitetalk.pipeline.guidance import guide
from wanvideo_infinitetalk.pipeline.long_video import FinishedWindow
from wanvideo_infinitetalk.pipeline.make_video import Job, _make_in_process
from wanvideo_infinitetalk.pipeline.processes import Seat
from wanvideo_infinitetalk.pipeline.recorder import Recorder
from wanvideo_infinitetalk.wanvideo.encoders.split import decode_split
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.errors import InputError
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards
from wanvideo_infinitetalk.wanvideo.modules.model import WanConfig
from wanvideo_infinitetalk.wanvideo.runtime.parallel import ALONE

from .models import random_inputs, random_model


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward: of a random model, with random inputs, `given` as `random_inputs` takes it and more arguments."""

    config: WanConfig
    given: dict[str, Any]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


def forwards(seat: Seat, cases: list[Forward]) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each case the velocity by this process alone, that by all together, and the copies of its guards."""
    found = []
    for case in cases:
        model = random_model(case.config)
        inputs = random_inputs(case.config, **case.given) | case.more
        model.mesh = ALONE
        alone = model(**inputs)
        model.mesh = seat.mesh
        with count_guards() as guards:
            together = model(**inputs)
        found.append((alone, together, guards.copies))
    return found


def guided(seat: Seat, scales: tuple[float, float]) -> tuple[list[torch.Tensor], int]:
    """The passes of a formula as all processes have them, in its order, and how many of them this one evaluated."""
    formula, evaluated = guide(*scales), []
    owner = {which: number for number, which in enumerate(formula.passes)}

    def evaluate(which: Any) -> torch.Tensor:
        evaluated.append(which)
        return torch.full((2, 3), float(owner[which]))

    assert seat.mesh.passes is not None
    found = seat.mesh.passes.evaluate(formula.passes, owner, evaluate, torch.zeros(2, 3))
    return [found[which] for which in formula.passes], len(evaluated)


def decoded(seat: Seat, file: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same latents, decoded whole and by all processes, for images of several forms."""
    vae, found = WanVAE.load(file), []
    assert seat.mesh.world is not None
    for rows, columns in ((2, 24), (22, 3), (1, 1)):
        video = torch.rand(1, 3, 5, rows, columns, generator=torch.Generator().manual_seed(4)) * 2 - 1
        video = torch.nn.functional.interpolate(video, scale_factor=(1, 8, 8), mode="trilinear")
        latents = vae.encode(video)
        found.append((vae.decode(latents), decode_split(vae, latents, seat.mesh.world)))
    return found


def misbehave(seat: Seat, how: tuple[int, str]) -> str:
    """One process dies, stops, or raises, while the others wait for it."""
    rank, what = how
    assert seat.mesh.world is not None
    if seat.mesh.world.rank == rank:
        if what in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, what))
        elif what == "sentence":
            raise InputError("There is no room for it.")
        elif what == "error":
            raise ZeroDivisionError
    return f"least {seat.mesh.least(seat.mesh.world.rank, seat.device)}"


def frames_of(make: Callable[[], object]) -> np.ndarray:
    """The frames that a video is made of, as they come to the video encoder: [n, H, W, 3] in 0 to 255."""
    found = []
    add = Recorder.add

    def noted(recorder: Recorder, window: FinishedWindow) -> None:
        found.append(window.frames.numpy().astype(int))
        add(recorder, window)

    Recorder.add = noted  # type: ignore[method-assign]
    try:
        make()
    finally:
        Recorder.add = add  # type: ignore[method-assign]
    return np.concatenate(found) if found else np.zeros(0, int)


def video(seat: Seat, job: Job) -> np.ndarray:
    """The frames of a job as all processes make it together."""
    return frames_of(lambda: _make_in_process(seat, job))


WORKS = {"video": video, "forwards": forwards, "guided": guided, "decoded": decoded, "misbehave": misbehave}


def work(seat: Seat, asked: tuple[str, Any]) -> Any:
    """Any of them, by name, so that tests can share processes, whose start takes seconds."""
    name, argument = asked
    return WORKS[name](seat, argument)
