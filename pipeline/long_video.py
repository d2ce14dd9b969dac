"""Long videos: one window of frames after the other, each denoised, decoded and handed out before the next.

    plan = plan_video(config, image.size, [len(features)])
    for window in generate(model, vae, clip, conditioning, plan):
        writer.append(window.frames)

Each window is conditioned on a source frame (the image, or the frame of a source video where the window starts) and
on the last frames of the window before. Nothing is kept but those, so memory does not grow with the recording.

Modes. `infinitetalk`: the condition is a source frame in every window, and the motion latents (of the image at first,
then of the frames carried over) stand clean at the front of the latents throughout. `multitalk`: later windows are
conditioned on the carried frames themselves, whose latents stand at the front noised to each step's sigma. `flashtalk`:
as `infinitetalk`, but that the first window, too, gives out none of its motion frames, and begins so many earlier.

Random numbers come from one generator on the CPU, so that a seed means the same on every device. The order of draws is
that of the public loop: a window's noise; in later windows one draw of the motion latents' shape before the first step
and one after every step, which `multitalk` uses, `infinitetalk` only takes, and `flashtalk` does not draw: its
scheduler does, noise of the whole window after every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..media.color import match_colors
from ..media.video import to_bytes
from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.runtime.host import to_host
from .attention_policy import SAFER
from .conditioning import ClipLike, Conditioner, Conditioning, Stage, VaeLike, WindowConditioner
from .kept_keys import KeptKeys
from .nonfinite import FallbackModes
from .plan import Plan
from .sampling import denoise, draw
from .windows import Window

__all__ = ["Callbacks", "FinishedWindow", "RunState", "generate", "generate_windows"]


@dataclass(frozen=True)
class RunState:
    """What the windows to come need of those before: with it a run goes on as if it had not ended.

    Attributes:
        windows: finished ones, which is the index of the next.
        generator: state of the random numbers, uint8.
        carried: the last frames of the window before [3, motion_frames, H, W] in [-1, 1].
        floor: attention mode that non-finite values led to (`FallbackModes.floor`), or None.
        latents: of the window before, as in `FinishedWindow`.
    """

    windows: int
    generator: torch.Tensor
    carried: torch.Tensor
    floor: str | None
    latents: torch.Tensor


@dataclass(frozen=True)
class FinishedWindow:
    """What a window adds to the video.

    Attributes:
        index, count: which of how many windows; 0 where their number is not known.
        frames: new frames [n, H, W, 3] on the CPU, float32 in [0, 1], or uint8 where that was asked for.
        latents: the whole window's clean latents [16, T, H / 8, W / 8], the carried part included.
        state: what the next one needs.
    """

    index: int
    count: int
    frames: torch.Tensor
    latents: torch.Tensor
    state: RunState


@dataclass(frozen=True)
class Callbacks:
    """Ways to follow and stop a run.

    Attributes:
        progress: (window, windows, step, steps) after each step, step counting from 1. A window that starts over counts
            again.
        check_interrupt: called before each evaluation of the model; what it raises ends the run.
        preview: (clean latents as guessed so far [16, T, h, w], window, step) after each step.
        stage: "model", "vae" or "clip" -> a context in which that part is used; the place to bring weights to the GPU.
    """

    progress: Callable[[int, int, int, int], None] | None = None
    check_interrupt: Callable[[], None] | None = None
    preview: Callable[[torch.Tensor, int, int], None] | None = None
    stage: Stage = contextlib.nullcontext


def generate(
    model: Callable[..., torch.Tensor],
    vae: VaeLike,
    clip: ClipLike | None,
    conditioning: Conditioning,
    plan: Plan,
    callbacks: Callbacks | None = None,
    fallback: Mapping[str, str] = SAFER,
    start: RunState | None = None,
    frames_dtype: torch.dtype = torch.float32,
) -> Iterator[FinishedWindow]:
    """Finished windows, in order; their frames make the video, exactly `plan.total` of them.

    Args:
        model: called like `WanModel.forward`; gives the velocity [1, 16, T, h, w], of x's dtype.
        clip: None for models without image tokens.
        fallback: attention mode -> the next safer one. When a step gives non-finite values, its window starts over,
            with the same random numbers, in the next one that this device runs, and later windows stay there.
        start: the state after the last window of an earlier run with the same arguments; the windows behind it are
            made, as that run would have made them.
        frames_dtype: of the frames handed out: float32; or uint8, rounded where they are, so that a fourth of the bytes
            is copied.

    Raises:
        InputError: at once, for inputs that do not fit.
        InfiniteTalkError: while it runs, when the safest mode gives non-finite values too, or what decodes does.
    """
    callbacks = callbacks or Callbacks()
    conditioner = WindowConditioner(vae, clip, conditioning, plan, callbacks.stage)
    return generate_windows(model, vae, conditioner, plan, callbacks, fallback, start, frames_dtype)


def generate_windows(
    model: Callable[..., torch.Tensor],
    vae: VaeLike,
    conditioner: Conditioner,
    plan: Plan,
    callbacks: Callbacks,
    fallback: Mapping[str, str],
    start: RunState | None = None,
    frames_dtype: torch.dtype = torch.float32,
    windows: Iterable[Window] | None = None,
) -> Iterator[FinishedWindow]:
    """`generate` with a conditioner of the caller's.

    Args:
        windows: in place of the plan's, each asked for when the one before was handed out; their count is then 0.
    """
    config, schedule, count = plan.config, plan.schedule, len(plan.windows) if windows is None else 0
    device = torch.device(config.device)
    generator = torch.Generator("cpu").manual_seed(int(config.seed))
    modes = FallbackModes(model, config.attention_policy, fallback, schedule.steps, device)
    kept = KeptKeys(model, device)
    carried: torch.Tensor | None = None  # [3, motion_frames, H, W], the end of the window before
    first = 0
    if start is not None:
        generator.set_state(start.generator)
        first, carried, modes.floor = start.windows, start.carried.to(device), start.floor

    for window in plan.windows[first:] if windows is None else windows:

        def report(step: int, clean: torch.Tensor, index: int = window.index) -> None:
            if callbacks.preview is not None:
                callbacks.preview(clean, index, step)
            if callbacks.progress is not None:
                callbacks.progress(index, count, step + 1, schedule.steps)

        condition = conditioner(window, carried)
        conditioner.prepare(window)
        x = draw(condition.shape, generator, device)
        if condition.source is not None:
            x = schedule.scheduler.add_noise(condition.source, x, schedule.start)
        with callbacks.stage("model"):
            latents, _ = denoise(
                model,
                schedule,
                x,
                condition.inputs,
                generator=generator,
                modes=modes,
                kept=kept,
                overwrite=condition.motion,
                report=report,
                check_interrupt=callbacks.check_interrupt,
                place=f"window {window.index + 1}, ",
            )
        latents = latents[:, : latents.shape[1] - condition.behind]
        with callbacks.stage("vae"):
            frames = _decode(vae, latents, plan, window)
        # The next window begins with the last frames; those before, which the window before gave out, are not used.
        unused = min(window.overlap, window.frames - config.motion_frames)
        reference = conditioner.reference.to(frames.device)
        frames = match_colors(frames[:, unused:], reference, config.color_correction, config.color_method)
        carried = frames[:, -config.motion_frames :].clone()
        new = frames[:, window.overlap - unused :][:, : window.new]
        pixels = ((new + 1) / 2).permute(1, 2, 3, 0)
        pixels = to_host(to_bytes(pixels) if frames_dtype == torch.uint8 else pixels)
        del frames, new
        state = RunState(window.index + 1, generator.get_state(), carried, modes.floor, latents)
        yield FinishedWindow(window.index, count, pixels, latents, state)


@torch.no_grad()
def _decode(vae: VaeLike, latents: torch.Tensor, plan: Plan, window: Window) -> torch.Tensor:
    """[16, T, h, w] -> frames [3, F, H, W] in [-1, 1]."""
    frames = vae.decode(latents.unsqueeze(0), tiled=plan.config.tiled_vae)[0]
    if not bool(torch.isfinite(frames).all()):
        raise InfiniteTalkError(
            f"Decoding gave non-finite frames in window {window.index + 1} from finite latents: the precision of what "
            "decodes is too low; load it in bf16 or float32."
        )
    return frames
