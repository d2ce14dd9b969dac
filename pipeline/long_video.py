"""The generation loop: one window of frames after the other, each denoised, decoded and handed out before the next.

    for window in generate(model, vae, clip, conditioning, config):
        writer.append(window.frames)

Each window is conditioned on a source frame (the picture, or the frame of a source video where the window starts) and
on the last frames of the window before. Nothing is kept but those, so memory does not grow with the recording.

Modes. `infinitetalk`: the condition is a source frame in every window, and the motion latents (of the picture at first,
then of the frames carried over) stand clean at the front of the latents throughout. `multitalk`: later windows are
conditioned on the carried frames themselves, whose latents stand at the front noised to each step's sigma.

Random numbers come from one generator on the CPU, so that a seed means the same on every device. The order of draws is
that of the public loop: a window's noise; in later windows one draw of the motion latents' shape before the first step
and one after every step, which `multitalk` uses and `infinitetalk` only takes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..media.color import match_colors
from ..media.images import DEFAULT_AREA, cover_picture, fit_size, load_picture
from ..media.masks import MAX_SPEAKERS, latent_masks
from ..wanvideo.errors import InfiniteTalkError, InputError
from ..wanvideo.modules.attention import AttentionMode
from .attention_policy import SAFER
from .guidance import Guidance, Pass, per_step
from .nonfinite import AttentionPolicy, Ladder, refuse_non_finite
from .schedulers import Scheduler, make_scheduler
from .windows import Window, audio_rows, latent_frames, plan_windows

__all__ = [
    "MODES",
    "AttentionPolicy",
    "Callbacks",
    "ClipLike",
    "Conditioning",
    "FinishedWindow",
    "FrameSource",
    "GenerateConfig",
    "ModelLike",
    "VaeLike",
    "generate",
]

log = logging.getLogger(__name__)

MODES = ("infinitetalk", "multitalk")


class ModelLike(Protocol):
    """What is called like `WanModel.forward`; the velocity comes back as [1, 16, T, h, w], of x's dtype."""

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        audio: torch.Tensor | None = None,
        ref_target_masks: torch.Tensor | None = None,
        *,
        audio_scale: float = 1.0,
        attention_mode: AttentionMode | None = None,
    ) -> torch.Tensor: ...


class VaeLike(Protocol):
    """Pixels [1, 3, F, H, W] in [-1, 1] to normalised latents [1, 16, T, H / 8, W / 8], and back."""

    def encode(self, video: torch.Tensor, *, tiled: bool = False) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor, *, tiled: bool = False) -> torch.Tensor: ...


class ClipLike(Protocol):
    """A picture [1, 3, H, W] in [-1, 1] to tokens [1, 257, 1280]."""

    def encode(self, image: torch.Tensor) -> torch.Tensor: ...


class FrameSource(Protocol):
    """Frames by index, read one after the other: a list of pictures, or a `video.VideoFrames`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate. Defaults are the public ones of InfiniteTalk at 480p.

    Attributes:
        width, height: of the video, pixels; rounded to multiples of 16. A missing one follows the picture's aspect;
            without both, the aspect is kept within `area` pixels.
        frames, motion_frames: length of a window and how much of it is carried over, both 4n + 1.
        total_frames: length of the video; None: as long as the longest recording.
        steps, shift, scheduler, sigmas: see `make_scheduler`.
        start_step: steps left out at the front. Above 0 the latents begin as those of the source video, noised to that
            step's sigma (video to video): the higher, the closer to the source.
        cfg: text guidance scale, or one for each step. 1 is none (distilled models), the public scale is 5.
        audio_cfg: audio guidance scale likewise. The public scale is 4.
        guidance: formula that combines them, one of `guidance.FORMULAS`.
        use_apg, apg_momentum, apg_norm_threshold: see `Guidance`.
        audio_scale: factor on what the speech adds inside the model.
        seed: of all random numbers.
        mode: one of `MODES`.
        color_correction: 0 to 1, how far each frame takes on the colours of the first condition picture.
        attention_policy: mode of the attention kernels, or (step, steps) -> mode. None: the model's own.
        tiled_vae: encode and decode in tiles, for small GPUs.
        device: where latents live and the model is called.
    """

    width: int | None = None
    height: int | None = None
    area: int = DEFAULT_AREA
    frames: int = 81
    motion_frames: int = 9
    total_frames: int | None = None
    steps: int = 40
    shift: float = 7.0
    scheduler: str = "multitalk"
    sigmas: Sequence[float] | None = None
    start_step: int = 0
    cfg: float | Sequence[float] = 5.0
    audio_cfg: float | Sequence[float] = 4.0
    guidance: str = "additive"
    use_apg: bool = False
    apg_momentum: float = -0.75
    apg_norm_threshold: float = 55.0
    audio_scale: float = 1.0
    seed: int = 42
    mode: str = "infinitetalk"
    color_correction: float = 1.0
    attention_policy: AttentionPolicy | None = None
    tiled_vae: bool = False
    device: str | torch.device = "cpu"


@dataclass(frozen=True)
class Conditioning:
    """What to generate from.

    Attributes:
        context: prompt embedding [n, text_dim].
        negative: embedding of the negative prompt [m, text_dim]; not read where every cfg is 1.
        audio: for each speaker, one row of speech features per video frame [rows, layers, hidden]. Speakers may differ
            in length: the longest one counts, the others hold their last row.
        source: the picture as the only item, or the frames of a source video; see `load_picture` for what they may be.
            A source shorter than the video goes on with its last frame.
        masks: one plane [H, W] per speaker; None puts speakers side by side. Not read for one speaker.
    """

    context: torch.Tensor
    negative: torch.Tensor
    audio: Sequence[torch.Tensor]
    source: FrameSource
    masks: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class FinishedWindow:
    """What a window adds to the video.

    Attributes:
        index, count: which of how many windows.
        frames: new frames [n, H, W, 3], float32 in [0, 1], on the CPU.
        latents: the whole window's clean latents [16, T, H / 8, W / 8], the carried part included.
    """

    index: int
    count: int
    frames: torch.Tensor
    latents: torch.Tensor


def _no_stage(name: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


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
    stage: Callable[[str], AbstractContextManager[Any]] = field(default=_no_stage)


def generate(
    model: ModelLike,
    vae: VaeLike,
    clip: ClipLike | None,
    conditioning: Conditioning,
    config: GenerateConfig,
    callbacks: Callbacks | None = None,
    fallback: Mapping[str, str] = SAFER,
) -> Iterator[FinishedWindow]:
    """Finished windows, in order; their frames make the video, exactly `total_frames` of them.

    Args:
        clip: None for models without picture tokens.
        fallback: attention mode -> the next safer one. When a step gives non-finite values, its window starts over,
            with the same random numbers, in the next one that this device runs, and later windows stay there.

    Raises:
        InputError: at once, for settings and inputs that do not fit.
        InfiniteTalkError: while it runs, when the safest mode gives non-finite values too, or the VAE does.
    """
    return _Run(model, vae, clip, conditioning, config, callbacks or Callbacks(), fallback).windows()


@dataclass(frozen=True)
class _WindowInputs:
    """What the denoising of one window is given, on the device."""

    y: torch.Tensor  # [1, 20, T, h, w]: 4 mask channels, 16 latent channels
    clip: torch.Tensor | None  # [1, 257, 1280]
    audio: torch.Tensor  # [speakers, frames, 5, layers, hidden]
    motion: torch.Tensor | None  # [16, Tm, h, w], stands at the front of the latents
    source: torch.Tensor | None  # [16, T, h, w], latents of the source video where the run starts late


class _Run:
    """The state of one generation: the plan, the random numbers, the frames carried over, the attention mode."""

    def __init__(
        self,
        model: ModelLike,
        vae: VaeLike,
        clip: ClipLike | None,
        conditioning: Conditioning,
        config: GenerateConfig,
        callbacks: Callbacks,
        fallback: Mapping[str, str],
    ) -> None:
        self.model, self.vae, self.clip = model, vae, clip
        self.given, self.config, self.callbacks = conditioning, config, callbacks
        self.device = torch.device(config.device)
        self.total = _check(conditioning, config)
        self.plan = plan_windows(self.total, config.frames, config.motion_frames)
        self.scheduler: Scheduler = make_scheduler(config.scheduler, config.steps, config.shift, config.sigmas)
        self.steps = len(self.scheduler)
        if not 0 <= config.start_step < self.steps:
            raise InputError(
                f"The start step {config.start_step} leaves none of {self.steps} steps: set it below that."
            )
        self.ladder = Ladder(model, config.attention_policy, fallback, self.steps, self.device)
        self.text_scales = per_step(config.cfg, self.steps, "cfg")
        self.audio_scales = per_step(config.audio_cfg, self.steps, "audio cfg")
        self._new_guidance()  # refuses unknown formulas now rather than after the first encoding

        first = load_picture(conditioning.source[0])
        self.width, self.height = fit_size(first.size, config.width, config.height, config.area)
        self.reference = cover_picture(first, self.width, self.height)  # [3, H, W], the colours to keep
        speakers = len(conditioning.audio)
        masks = latent_masks(conditioning.masks, speakers, first.size, self.width, self.height)
        self.masks = masks.to(self.device)
        self.context = conditioning.context.to(self.device)
        self.negative = conditioning.negative.to(self.device)

        self.rng = torch.Generator("cpu").manual_seed(config.seed)
        self.carried: torch.Tensor | None = None  # [3, motion_frames, H, W], the end of the window before
        self._condition_of: tuple[int, torch.Tensor, torch.Tensor | None] | None = None

    # --- the loop

    def windows(self) -> Iterator[FinishedWindow]:
        for window in self.plan:
            inputs = self._inputs(window)
            latents = self._denoise_safely(window, inputs)
            frames = self._decode(latents, window)  # [3, F, H, W]
            self.carried = frames[:, -self.config.motion_frames :].clone()
            new = frames[:, window.overlap : window.overlap + window.new]
            pixels = ((new + 1) / 2).permute(1, 2, 3, 0).cpu()
            del frames, new
            yield FinishedWindow(window.index, len(self.plan), pixels, latents)

    def _denoise_safely(self, window: Window, inputs: _WindowInputs) -> torch.Tensor:
        """Clean latents of the window; while values are not finite, it starts over in the next safer attention mode."""

        def attempt() -> torch.Tensor:
            with self.callbacks.stage("model"):
                return self._denoise(window, inputs)

        return self.ladder.climb(attempt, self.rng, f"window {window.index + 1}, ")

    @torch.no_grad()
    def _denoise(self, window: Window, inputs: _WindowInputs) -> torch.Tensor:
        """Noise to clean latents [16, T, h, w]."""
        config, scheduler = self.config, self.scheduler
        shape = tuple(inputs.y[0, 4:].shape)  # (16, T, h, w)
        guidance = self._new_guidance()
        x = self._draw(shape)
        if inputs.source is not None:
            x = scheduler.add_noise(inputs.source, x, config.start_step)
        x = self._put_motion(window, x, inputs.motion, config.start_step)

        for step in range(config.start_step, self.steps):
            t = scheduler.timesteps[step : step + 1].float().to(self.device)
            evaluate = self._evaluator(x, t, inputs, self.ladder.mode(step))
            v = guidance.velocity(evaluate, self.text_scales[step], self.audio_scales[step])
            refuse_non_finite(v, step, self.model, evaluate)
            if self.callbacks.preview is not None:
                self.callbacks.preview(scheduler.clean(v, step, x), window.index, step)
            noise = self._draw(shape) if scheduler.needs_noise else None
            x = scheduler.step(v, step, x, noise)
            x = self._put_motion(window, x, inputs.motion, step + 1)
            if self.callbacks.progress is not None:
                self.callbacks.progress(window.index, len(self.plan), step + 1, self.steps)
        return x

    def _put_motion(self, window: Window, x: torch.Tensor, motion: torch.Tensor | None, i: int) -> torch.Tensor:
        """x [16, T, h, w] at sigma i with the motion latents [16, Tm, h, w] at its front."""
        if motion is None:
            return x
        if window.index > 0:
            noise = self._draw(tuple(motion.shape))  # drawn in both modes: the random stream is the public loop's
            if self.config.mode == "multitalk":
                motion = self.scheduler.add_noise(motion, noise, i)
        return torch.cat([motion, x[:, motion.shape[1] :]], dim=1)

    def _evaluator(
        self, x: torch.Tensor, t: torch.Tensor, inputs: _WindowInputs, mode: AttentionMode | None
    ) -> Callable[[Pass], torch.Tensor]:
        silence = torch.zeros_like(inputs.audio[:1])  # one speaker, whatever their number

        def evaluate(which: Pass) -> torch.Tensor:
            if self.callbacks.check_interrupt is not None:
                self.callbacks.check_interrupt()
            velocity = self.model(
                x,
                t,
                self.context if which.prompt else self.negative,
                inputs.clip,
                inputs.y,
                inputs.audio if which.speech else silence,
                self.masks,
                audio_scale=self.config.audio_scale,
                attention_mode=mode,
            )
            return velocity[0]

        return evaluate

    def _new_guidance(self) -> Guidance:
        c = self.config
        return Guidance(c.guidance, c.use_apg, c.apg_momentum, c.apg_norm_threshold)

    def _draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng).to(self.device)

    # --- inputs of a window

    @torch.no_grad()
    def _inputs(self, window: Window) -> _WindowInputs:
        source = None
        if self.config.start_step > 0:
            source = self._encode(torch.stack([self._picture(f) for f in range(window.start, window.end)], dim=1))
        motion = None
        if self.config.mode == "multitalk" and self.carried is not None:
            y, motion = self._continued_condition(self.carried)
            clip = self._clip(self.carried[:, -1])
        else:
            y, clip = self._source_condition(window)
            if self.carried is not None:
                motion = self._encode(self.carried)
            elif self.config.mode == "infinitetalk":
                motion = y[0, 4:, :1]  # the VAE is causal: these are the latents of the picture alone
        return _WindowInputs(y, clip, self._audio(window), motion, source)

    def _source_condition(self, window: Window) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y and picture tokens of the source frame where the window starts, kept for the windows that share it."""
        index = min(window.start, len(self.given.source) - 1)
        if self._condition_of is None or self._condition_of[0] != index:
            picture = self._picture(index)
            y, _ = self._continued_condition(picture.unsqueeze(1))
            self._condition_of = (index, y, self._clip(picture))
        return self._condition_of[1:]

    def _continued_condition(self, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Known first frames [3, K, H, W] -> (y [1, 20, T, h, w], their latents [16, Tk, h, w]); the rest is grey."""
        grey = known.new_zeros(3, self.config.frames - known.shape[1], self.height, self.width)
        latents = self._encode(torch.cat([known, grey], dim=1))  # [16, T, h, w]
        front = latent_frames(known.shape[1])
        mask = latents.new_zeros(4, *latents.shape[1:])
        mask[:, :front] = 1
        return torch.cat([mask, latents]).unsqueeze(0), latents[:, :front]

    def _picture(self, index: int) -> torch.Tensor:
        """Source frame [3, H, W] in [-1, 1]; beyond its end the last one."""
        frame = self.given.source[min(index, len(self.given.source) - 1)]
        return cover_picture(load_picture(frame), self.width, self.height)

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[3, F, H, W] -> [16, T, h, w]"""
        with self.callbacks.stage("vae"):
            latents = self.vae.encode(frames.unsqueeze(0).to(self.device), tiled=self.config.tiled_vae)
        return latents[0].to(self.device, torch.float32)

    def _clip(self, picture: torch.Tensor) -> torch.Tensor | None:
        if self.clip is None:
            return None
        with self.callbacks.stage("clip"):
            return self.clip.encode(picture.unsqueeze(0).to(self.device)).to(self.device)

    def _audio(self, window: Window) -> torch.Tensor:
        """What each frame hears, [speakers, frames, 5, layers, hidden]."""
        rows = torch.tensor(audio_rows(window, self.total))  # [frames, 5]
        heard = [features[rows.clamp(max=len(features) - 1)] for features in self.given.audio]
        return torch.stack(heard).to(self.device)

    # --- frames

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor, window: Window) -> torch.Tensor:
        """[16, T, h, w] -> frames [3, F, H, W] in [-1, 1], colours corrected."""
        with self.callbacks.stage("vae"):
            frames = self.vae.decode(latents.unsqueeze(0), tiled=self.config.tiled_vae)[0]
        if not bool(torch.isfinite(frames).all()):
            raise InfiniteTalkError(
                f"The VAE gave non-finite frames in window {window.index + 1} from finite latents: its precision is "
                "too low; load it in bf16 or float32."
            )
        return match_colors(frames, self.reference.to(frames.device), self.config.color_correction)


def _check(given: Conditioning, config: GenerateConfig) -> int:
    """The number of frames to make; refuses what cannot be generated from."""
    if config.mode not in MODES:
        raise InputError(f"There is no mode '{config.mode}': choose one of {', '.join(MODES)}.")
    if not 1 <= len(given.audio) <= MAX_SPEAKERS:
        raise InputError(f"{len(given.audio)} recordings are given: give one to {MAX_SPEAKERS}.")
    if not 0 <= config.color_correction <= 1:
        raise InputError(f"The colour correction of {config.color_correction} is not between 0 and 1.")
    if len(given.source) < 1:
        raise InputError("The source video holds no frame: give another.")
    shapes = {tuple(features.shape[1:]) for features in given.audio}
    if len(shapes) != 1 or any(features.ndim != 3 or len(features) == 0 for features in given.audio):
        raise InputError(f"Speech features {sorted(shapes)} do not fit: give [rows, layers, hidden], alike for all.")
    named = [("speech features", f) for f in given.audio] + [("prompt", given.context), ("negative", given.negative)]
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"The {name} embedding holds NaN or infinite values: check the encoder and its input.")
    return max(len(features) for features in given.audio) if config.total_frames is None else config.total_frames
