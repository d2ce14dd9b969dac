"""One window of video without the loop around it: condition channels of pictures, and the denoising of latents.

Long videos are made by `pipeline`; this serves text to video, picture to video, and single windows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wanvideo.errors import InputError
from ..wanvideo.modules.attention import AttentionMode
from .attention_policy import SAFER
from .guidance import Guidance, Pass
from .nonfinite import AttentionPolicy, Ladder, refuse_non_finite
from .schedulers import Scheduler

INTERPOLATIONS = ("linear", "ease_in", "ease_out")


def cfg_schedule(
    steps: int, start: float, end: float, interpolation: str, start_percent: float = 0.0, end_percent: float = 1.0
) -> list[float]:
    """One guidance scale per step: from `start` to `end` within the given part of the run, 1 (none) outside of it.

    Args:
        interpolation: "linear", "ease_in" (slow at first, t^2) or "ease_out" (slow at last, t (2 - t)).
        start_percent, end_percent: 0 to 1; the steps from int(steps * start) to below int(steps * end), at least one.

    Raises InputError for another interpolation, or a part that ends before it begins.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"There is no interpolation '{interpolation}': choose one of {', '.join(INTERPOLATIONS)}.")
    if not 0 <= start_percent <= end_percent <= 1:
        raise InputError(f"The part from {start_percent} to {end_percent} is none: start below end, within 0 to 1.")
    first = min(int(steps * start_percent), steps - 1)
    last = max(first, int(steps * end_percent) - 1)
    scales = [1.0] * steps
    for i in range(first, last + 1):
        t = (i - first) / (last - first) if last > first else 0.0
        eased = {"linear": t, "ease_in": t * t, "ease_out": t * (2 - t)}[interpolation]
        scales[i] = start + (end - start) * eased
    return scales


# --- condition channels ------------------------------------------------------------------------------------------


class Encoder(Protocol):
    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Keyframes:
    """Pictures that a window is to contain.

    Attributes:
        start: first frames [N, 3, H, W] in [-1, 1].
        end: last frames, likewise.
        empty: what fills the frames between [N, 3, H, W], its last one going on; grey without it.
        given: [F] or [F, h, w], 1 where a frame (or a place in it) is given; instead of first and last.
        start_strength, end_strength: factors on the latents of the first and of the last frame.
        noise: standard deviation of noise on the given pictures; `empty_noise`: in the frames between.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    empty: Tensor | None = None
    given: Tensor | None = None
    start_strength: float = 1.0
    end_strength: float = 1.0
    noise: float = 0.0
    empty_noise: float = 0.0


def keyframe_condition(
    vae: Encoder, keys: Keyframes, frames: int, height: int, width: int, *, tiled: bool = False, seed: int = 0
) -> Tensor:
    """Condition channels y [1, 20, T, h, w] of Wan2.1 I2V: 4 mask channels (a latent frame's frames), 16 of latents.

    Raises InputError for lengths that are not 4n + 1 or too short for the pictures.
    """
    if frames < 1 or frames % 4 != 1:
        raise InputError(f"{frames} frames are not 4n + 1: set num_frames to {max(1, frames // 4 * 4 + 1)}.")
    first = 0 if keys.start is None else len(keys.start)
    last = 0 if keys.end is None else len(keys.end)
    if first + last > frames:
        raise InputError(f"{first + last} given pictures do not fit into {frames} frames: give fewer.")
    generator = torch.Generator("cpu").manual_seed(seed)

    def noisy(pictures: Tensor, strength: float) -> Tensor:
        if strength == 0:
            return pictures
        return pictures + strength * torch.randn(pictures.shape, generator=generator).to(pictures)

    between = frames - first - last
    filler = torch.zeros(1, 3, height, width) if keys.empty is None else keys.empty.float()
    filler = torch.cat([filler, filler[-1:].expand(max(0, between - len(filler)), -1, -1, -1)])[:between]
    parts = [noisy(filler, keys.empty_noise)]
    if keys.start is not None:
        parts.insert(0, noisy(keys.start.float(), keys.noise))
    if keys.end is not None:
        parts.append(noisy(keys.end.float(), keys.noise))
    video = torch.cat(parts).transpose(0, 1).unsqueeze(0)  # [1, 3, F, H, W]
    latents = vae.encode(video, tiled=tiled).float().clone()  # [1, 16, T, h, w]
    if keys.start is not None:
        latents[:, :, :1] *= keys.start_strength
    if keys.end is not None:
        latents[:, :, -1:] *= keys.end_strength
    mask = _frame_mask(keys, frames, first, last, (int(latents.shape[3]), int(latents.shape[4])))
    return torch.cat([mask.to(latents).unsqueeze(0), latents], dim=1)


def _frame_mask(keys: Keyframes, frames: int, first: int, last: int, size: tuple[int, int]) -> Tensor:
    """[4, T, h, w] of 0 and 1: the first frame four times, then groups of four frames."""
    if keys.given is None:
        mask = torch.zeros(frames, *size)
        mask[:first] = 1
        mask[frames - last :] = 1
    else:
        if len(keys.given) != frames:
            raise InputError(f"{len(keys.given)} frame masks for {frames} frames: give one per frame.")
        planes = keys.given.float().reshape(frames, 1, *(keys.given.shape[1:] or (1, 1)))
        mask = (F.interpolate(planes, size=size, mode="nearest")[:, 0] > 0.5).float()
    groups = torch.cat([mask[:1].expand(4, -1, -1), mask[1:]])  # [4 T, h, w]
    return groups.unflatten(0, (-1, 4)).transpose(0, 1)


# --- denoising ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowInputs:
    """What the model is given besides the noisy latents, all on the device.

    Attributes:
        context, negative: prompt embeddings [n, text_dim]; `negative` is read where cfg is not 1.
        y: condition channels [1, 20, T, h, w] of I2V models.
        clip, negative_clip: picture tokens [1, 257, 1280]; the second one goes with the negative prompt.
        audio: [speakers, frames, 5, layers, hidden]; None leaves the audio layers out.
        masks: [speakers + 1, h, w].
    """

    context: Tensor
    negative: Tensor
    y: Tensor | None = None
    clip: Tensor | None = None
    negative_clip: Tensor | None = None
    audio: Tensor | None = None
    masks: Tensor | None = None
    audio_scale: float = 1.0


@dataclass(frozen=True)
class StepReport:
    """After each step: `done` of `total` steps, and the clean latents [16, T, h, w] as guessed."""

    done: int
    total: int
    clean: Tensor


def denoise(
    model: Callable[..., Tensor],
    scheduler: Scheduler,
    x: Tensor,
    inputs: WindowInputs,
    *,
    cfg: Sequence[float],
    audio_cfg: Sequence[float],
    generator: torch.Generator,
    guidance: Guidance,
    start_step: int = 0,
    end_step: int | None = None,
    attention_policy: AttentionPolicy | None = None,
    fallback: Mapping[str, str] = SAFER,
    report: Callable[[StepReport], None] | None = None,
    check_interrupt: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents [16, T, h, w] at the noise of `start_step` -> (latents before `end_step`, last guess of the clean ones).

    Args:
        model: called like `WanModel.forward`.
        cfg, audio_cfg: one scale per step of the whole schedule.
        guidance: a new one, since APG remembers the steps before.
        attention_policy: attention mode, or (step, steps) -> mode of that step; None leaves it to the model.
        fallback: attention mode -> the next safer one. When a step gives non-finite values, all steps are run again,
            with the same random numbers, in the next one that this device runs.

    Raises InfiniteTalkError when the safest mode gives non-finite values too.
    """
    steps = len(scheduler)
    end = steps if end_step is None else min(end_step, steps)
    ladder = Ladder(model, attention_policy, fallback, steps, x.device)

    def attempt() -> tuple[Tensor, Tensor]:
        latents = clean = x
        guide = copy.deepcopy(guidance)
        for step in range(start_step, end):
            t = scheduler.timesteps[step : step + 1].float().to(x.device)

            def evaluate(which: Pass, noisy: Tensor = latents, t: Tensor = t, step: int = step) -> Tensor:
                if check_interrupt is not None:
                    check_interrupt()
                return _evaluate(model, noisy, t, inputs, which, ladder.mode(step))

            v = guide.velocity(evaluate, cfg[step], audio_cfg[step])
            refuse_non_finite(v, step, model, evaluate)
            clean = scheduler.clean(v, step, latents)
            if report is not None:
                report(StepReport(step + 1 - start_step, end - start_step, clean))
            noise = torch.randn(x.shape, generator=generator).to(x) if scheduler.needs_noise else None
            latents = scheduler.step(v, step, latents, noise)
        return latents, clean

    return ladder.climb(attempt, generator)


def _evaluate(
    model: Callable[..., Tensor], x: Tensor, t: Tensor, inputs: WindowInputs, which: Pass, mode: AttentionMode | None
) -> Tensor:
    """One pass: with the prompt or the negative one (`which.prompt`), with the speech or zeros (`which.speech`)."""
    audio = inputs.audio
    if audio is not None and not which.speech:
        audio = torch.zeros_like(audio[:1])
    clip = inputs.clip
    if not which.prompt and inputs.negative_clip is not None:
        clip = inputs.negative_clip
    context = inputs.context if which.prompt else inputs.negative
    velocity = model(
        x, t, context, clip, inputs.y, audio, inputs.masks, audio_scale=inputs.audio_scale, attention_mode=mode
    )
    return velocity[0]
