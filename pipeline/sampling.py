"""The denoising loop: noise to clean latents of one window, for every model and every kind of generation.

What differs between models is data that the loop is given:

* which passes a step makes and how they combine: a `Formula` for each step (`guidance.py`);
* what the model is given in a pass: `inputs_of(pass)`, condition channels and fixed frames of its own included;
* what stands fixed in the latents between the steps: an `Overwrite`;
* whether fresh noise is drawn after a step: the scheduler's `needs_noise`.

Random numbers come from one generator on the CPU, so that a seed means the same on every device. The order of draws is
one of the overwrite's shape before the first step, then after every step, the last one too, one of the latents' shape
where the scheduler needs it, and one of the overwrite's.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fp8_optimization import listed
from ..wanvideo.errors import InputError
from ..wanvideo.modules.attention import KernelCounts
from ..wanvideo.modules.techniques import NormalizedAttention
from ..wanvideo.runtime.parallel import mesh_of
from .guidance import Formula, Pass, Projection
from .kept_keys import KeptKeys
from .nonfinite import FallbackModes, NonFinite, check_finite
from .schedulers import Scheduler
from .techniques import Technique, cache_of, forward_options

__all__ = ["ModelInputs", "Overwrite", "Schedule", "denoise", "draw", "what_ran"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overwrite:
    """Latents that stand in place of the first or last frames of x.

    Attributes:
        latents: clean latents [16, K, h, w].
        at_end: in place of the last K frames instead of the first.
        noised: between the steps, brought to each step's sigma with noise that is drawn for it; otherwise clean.
        draws: whether that noise is drawn, which `noised` needs; a public loop may draw it and not use it.
    """

    latents: Tensor
    at_end: bool = False
    noised: bool = False
    draws: bool = False

    def put(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """x [16, T, h, w] with `latents` (the clean ones unless given) in place; a new tensor."""
        latents = self.latents if latents is None else latents
        kept = x.shape[1] - latents.shape[1]
        return torch.cat([x[:, :kept], latents] if self.at_end else [latents, x[:, latents.shape[1] :]], dim=1)

    def at_step(self, x: Tensor, i: int, scheduler: Scheduler, generator: torch.Generator) -> Tensor:
        """x at sigma i with the latents in place at the same sigma, or clean."""
        noise = draw(self.latents.shape, generator, self.latents) if self.draws else None
        return self.put(x, scheduler.add_noise(self.latents, noise, i) if self.noised and noise is not None else None)


@dataclass(frozen=True)
class ModelInputs:
    """What the model is given in one pass besides x and t, all on the device.

    Attributes:
        context: prompt embedding [n, text_dim].
        clip: image tokens [1, 257, 1280].
        y: condition channels [1, 20, T, h, w].
        audio: [speakers, frames, 5, layers, hidden]; None leaves the audio layers out.
        masks: [speakers + 1, h, w].
        audio_scale: factor on what the speech adds inside the model.
        humo_audio: windows of speech features [T, 8, groups, C] for HuMo's audio layers, in place of `audio`.
        overwrite: frames that this pass alone sees in place of x's.
        nag: a prompt to move away from inside the text attention.
    """

    context: Tensor
    clip: Tensor | None = None
    y: Tensor | None = None
    audio: Tensor | None = None
    masks: Tensor | None = None
    audio_scale: float = 1.0
    humo_audio: Tensor | None = None
    overwrite: Overwrite | None = None
    nag: NormalizedAttention | None = None

    def speech(self) -> dict[str, Any]:
        """Keyword arguments of the model that concern the speech, besides `audio` and `masks`."""
        if self.humo_audio is None:
            return {"audio_scale": self.audio_scale}
        return {"humo_audio": self.humo_audio, "humo_audio_scale": self.audio_scale}


@dataclass(frozen=True)
class Schedule:
    """The steps of one window.

    Attributes:
        scheduler: of the whole schedule.
        formulas: guidance of each of its steps.
        start, end: the steps that are run, [start, end).
        apg: (momentum, norm threshold) of adaptive projected guidance; None: without.
        techniques: what else changes the passes, see `techniques`.

    Raises InputError where no step is left to run.
    """

    scheduler: Scheduler
    formulas: tuple[Formula, ...]
    start: int
    end: int
    apg: tuple[float, float] | None = None
    techniques: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.steps:
            raise InputError(f"The start step {self.start} leaves none of {self.steps} steps: set it below that.")

    @property
    def passes(self) -> Iterator[Pass]:
        """Those of each step, one after the other."""
        return (which for formula in self.formulas for which in formula.passes)

    @property
    def steps(self) -> int:
        """Of the whole schedule."""
        return len(self.scheduler)


def draw(shape: torch.Size | tuple[int, ...], generator: torch.Generator, like: Tensor | torch.device) -> Tensor:
    """Standard normal numbers of `shape`, drawn on the CPU, on the device (and in the dtype) of `like`."""
    return torch.randn(shape, generator=generator).to(like)


@torch.no_grad()
def denoise(
    model: Callable[..., Tensor],
    schedule: Schedule,
    x: Tensor,
    inputs_of: Callable[[Pass], ModelInputs],
    *,
    generator: torch.Generator,
    modes: FallbackModes,
    kept: KeptKeys | None = None,
    overwrite: Overwrite | None = None,
    report: Callable[[int, Tensor], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
    place: str = "",
) -> tuple[Tensor, Tensor]:
    """Latents [16, T, h, w] at the noise of the first step -> (after the last step, its guess of the clean ones).

    Args:
        model: called like `WanModel.forward`.
        x: float32, on the device.
        inputs_of: pass -> what the model is given in it.
        modes: attention mode of each step. When a step gives non-finite values, all steps are run again, with the same
            random numbers, in the next mode of its fallbacks.
        kept: keys and values of prompts and images, from windows before.
        report: called after each step with its index in the whole schedule and the clean latents as guessed by it.
        place: where this is, for messages, such as "window 2, ".

    Raises InfiniteTalkError when the last fallback gives non-finite values too.
    """
    keys = KeptKeys(model, x.device) if kept is None else kept
    split = mesh_of(model).passes
    numbers = {which: number for number, which in enumerate(dict.fromkeys(schedule.passes))}

    def attempt() -> tuple[Tensor, Tensor]:
        scheduler = copy.copy(schedule.scheduler)  # multistep solvers begin a history
        projection = None if schedule.apg is None else Projection(*schedule.apg)
        cache = cache_of(schedule.techniques)
        reuse = None if cache is None else cache.begin(model, schedule.steps)
        latents = clean = x
        if overwrite is not None:
            latents = overwrite.at_step(latents, schedule.start, scheduler, generator)
        for step in range(schedule.start, schedule.end):
            t = scheduler.timesteps[step : step + 1].float().to(x.device)

            def evaluate(which: Pass, noisy: Tensor = latents, t: Tensor = t, step: int = step) -> Tensor:
                if check_interrupt is not None:
                    check_interrupt()
                given = inputs_of(which)
                changes = forward_options(schedule.techniques, which, step, schedule.steps)
                if given.nag is not None:
                    changes["nag"] = given.nag
                seen = noisy if given.overwrite is None else given.overwrite.put(noisy)

                def compute(**more: Any) -> Tensor:
                    velocity = model(
                        seen,
                        t,
                        given.context,
                        given.clip,
                        given.y,
                        given.audio,
                        given.masks,
                        **given.speech(),
                        attention_mode=modes.mode(step),
                        **keys.of_forward(given.context, given.clip),
                        **changes,
                        **more,
                    )
                    return velocity[0]

                return compute() if reuse is None else reuse.velocity(which, step, seen, t, compute)

            formula = schedule.formulas[step]
            if split is None:
                found = {which: evaluate(which) for which in formula.passes}
            else:
                found = split.evaluate(formula.passes, numbers, evaluate, x)
            velocity = formula.combine(found, projection)
            try:
                check_finite(velocity, step, model, evaluate, formula.passes)
            except NonFinite:
                keys.clear()  # they may be among what was not finite
                raise
            clean = scheduler.clean(velocity, step, latents)
            noise = draw(x.shape, generator, x) if scheduler.needs_noise else None
            latents = scheduler.step(velocity, step, latents, noise)
            if overwrite is not None:
                latents = overwrite.at_step(latents, step + 1, scheduler, generator)
            if report is not None:
                report(step, clean)
        if reuse is not None:
            logger.info("%sstep cache: %d of %d passes were not computed", place, reuse.reused, reuse.passes)
        return latents, clean

    return modes.retry(attempt, generator, place)


def what_ran(linears: Counter[str], mode: str, policy: str, kernels: KernelCounts) -> str:
    """One line about a generation, for the log: what computed attention and linears, and what the guards copied.

    Args:
        linears: as `how_linears_run` counts them.
    """
    guards, calls = kernels.guards, [f"{name} ({count} calls)" for name, count in kernels.most_common()]
    loops = kernels.loops()
    weights = f"; weights of its 8-bit kernel by {listed(loops)} in blocks of 128 queries" if loops else ""
    return (
        f"Attention {mode} (policy {policy}) by {', '.join(calls) or 'none'}{weights}; linears {listed(linears)}; "
        f"guard copies {guards.copies} of {guards.calls} calls ({guards.bytes / 2**20:.1f} MiB)"
    )
