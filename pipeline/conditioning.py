"""What the model is conditioned on: condition channels of images, frames carried over, image tokens, speech rows.

Condition channels y [1, 20, T, h, w] of Wan2.1 I2V are 4 mask channels (1 where a frame is given: a latent frame holds
up to four) and 16 channels of latents of a video of the given frames, gray elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..media.images import cover_image, load_image
from ..wanvideo.errors import InputError
from ..wanvideo.modules.techniques import NormalizedAttention
from .guidance import Pass
from .plan import Plan
from .prompts import piece_of
from .sampling import ModelInputs, Overwrite
from .windows import Window, audio_rows, latent_frames

__all__ = [
    "ClipLike",
    "Conditioning",
    "FrameSource",
    "Keyframes",
    "Stage",
    "VaeLike",
    "WindowCondition",
    "WindowConditioner",
    "WindowInputs",
    "WindowSpeech",
    "keyframe_condition",
    "window_audio",
    "with_silence",
]

logger = logging.getLogger(__name__)

Stage = Callable[[str], AbstractContextManager[Any]]
"""Name of a part, "model", "vae" or "clip" -> a context in which it is used."""


class Encoder(Protocol):
    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor: ...


class VaeLike(Encoder, Protocol):
    """Pixels [1, 3, F, H, W] in [-1, 1] to normalized latents [1, 16, T, H / 8, W / 8], and back."""

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor: ...


class ClipLike(Protocol):
    """An image [1, 3, H, W] in [-1, 1] to tokens [1, 257, 1280]."""

    def encode(self, image: Tensor) -> Tensor: ...


class FrameSource(Protocol):
    """Frames by index, read one after the other: a list of images, or a `video.VideoFrames`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class WindowSpeech(Protocol):
    """A window of the plan -> features of the speech in it, [1, frames, 5, layers, hidden].

    Attributes:
        shape: (layers, hidden).
    """

    shape: tuple[int, int]

    def __call__(self, window: Window, /) -> Tensor: ...


# --- what a pass is given ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowInputs:
    """What one window's passes are given, all on the device; called with a pass, what that one is given.

    Attributes:
        context, negative: prompt embeddings [n, text_dim]; `negative` is read where cfg is not 1.
        y: condition channels [1, 20, T, h, w] of I2V models.
        clip, negative_clip: image tokens [1, 257, 1280]; the second one goes with the negative prompt.
        audio: [speakers, frames, 5, layers, hidden]; None leaves the audio layers out.
        masks: [speakers + 1, h, w].
        audio_scale: factor on what the speech adds inside the model.
        nag: a prompt to move away from inside the text attention, in the passes with the prompt.
    """

    context: Tensor
    negative: Tensor
    y: Tensor | None = None
    clip: Tensor | None = None
    negative_clip: Tensor | None = None
    audio: Tensor | None = None
    masks: Tensor | None = None
    audio_scale: float = 1.0
    nag: NormalizedAttention | None = None

    def __call__(self, which: Pass) -> ModelInputs:
        audio = self.audio
        if audio is not None and not which.speech:
            audio = torch.zeros_like(audio[:1])  # one silent speaker, whatever their number
        clip = self.clip if which.prompt or self.negative_clip is None else self.negative_clip
        context = self.context if which.prompt else self.negative
        nag = self.nag if which.prompt else None
        return ModelInputs(context, clip, self.y, audio, self.masks, self.audio_scale, nag=nag)


def window_audio(speakers: Sequence[Tensor], window: Window, total: int) -> Tensor:
    """Feature rows around each frame of the window, [speakers, frames, 5, layers, hidden].

    Args:
        speakers: for each, one row of features per video frame [rows, layers, hidden]; a shorter one holds its last.
        total: frames of the video.
    """
    rows = torch.tensor(audio_rows(window, total))  # [frames, 5]
    return torch.stack([features[rows.clamp(max=len(features) - 1)] for features in speakers])


def with_silence(audio: Tensor, masks: Tensor) -> Tensor:
    """Audio [speakers, ...] as the masks [planes, h, w] need it.

    A single speaker who is confined by a mask is followed by a silent one, who is everywhere else (`latent_masks`):
    among the audio tokens of one speaker alone there is nothing that image tokens could turn away from.
    """
    confined = len(audio) == 1 and not bool(masks[0].all())
    return torch.cat([audio, torch.zeros_like(audio)]) if confined else audio


# --- windows of a long video -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditioning:
    """What to generate from.

    Attributes:
        context: prompt embeddings [n, text_dim], one for each window; the last one goes on (see `prompts`).
        negative: embedding of the negative prompt [m, text_dim]; not read where every cfg is 1.
        audio: for each speaker, one row of speech features per video frame [rows, layers, hidden]. Speakers may differ
            in length: the longest one counts, the others hold their last row. Or what gives each window its rows.
        source: the image as the only item, or the frames of a source video; see `load_image` for what they may be.
            A source shorter than the video goes on with its last frame.
        nag: a prompt to move away from inside the text attention; None: without.
    """

    context: Sequence[Tensor]
    negative: Tensor
    audio: Sequence[Tensor] | WindowSpeech
    source: FrameSource
    nag: NormalizedAttention | None = None


@dataclass(frozen=True)
class WindowCondition:
    """What the denoising of one window is given, on the device.

    Attributes:
        inputs: pass -> what the model is given in it.
        shape: of the latents, (16, T, h, w).
        motion: latents that stand at the front throughout.
        source: latents [16, T, h, w] of the source video, where the run starts late.
        behind: latent frames behind those of the video, which are not decoded.
    """

    inputs: Callable[[Pass], ModelInputs]
    shape: tuple[int, ...]
    motion: Overwrite | None = None
    source: Tensor | None = None
    behind: int = 0


class Conditioner(Protocol):
    """The condition of each window, given the frames carried over from the one before.

    Attributes:
        reference: image [3, H, W] in [-1, 1] whose colors are kept.
    """

    reference: Tensor

    def __call__(self, window: Window, carried: Tensor | None, /) -> WindowCondition: ...

    def prepare(self, window: Window, /) -> None:
        """Begin with what the window behind this one needs, while this one is computed."""


class WindowConditioner:
    """The condition of each window of a planned video: `conditioner(window, carried)`.

    Args:
        clip: None for models without image tokens.
        stage: entered around each use of the VAE and of CLIP.

    Attributes:
        reference: the source's first frame [3, H, W] in [-1, 1], whose colors are kept.

    Raises InputError for inputs that are empty, not finite, or do not fit the plan.
    """

    def __init__(self, vae: Encoder, clip: ClipLike | None, given: Conditioning, plan: Plan, stage: Stage) -> None:
        _check_conditioning(given, plan)
        self.vae, self.clip, self.given, self.plan, self.stage = vae, clip, given, plan, stage
        self.device = torch.device(plan.config.device)
        self.context = [piece.to(self.device) for piece in given.context]
        self.negative = given.negative.to(self.device)
        self.nag = None if given.nag is None else replace(given.nag, negative=given.nag.negative.to(self.device))
        self.masks = plan.masks.to(self.device)
        self.reference = self.image(0)
        self._condition_of: tuple[int, Tensor, Tensor | None] | None = None
        self._reader = ThreadPoolExecutor(1, "source frames")
        self._ahead: tuple[int, Future[Tensor]] | None = None  # window, and its source frames

    @torch.no_grad()
    def __call__(self, window: Window, carried: Tensor | None) -> WindowCondition:
        """The condition of `window`; `carried`: the last frames [3, motion, H, W] of the one before, in [-1, 1]."""
        mode = self.plan.mode
        source = None
        if self.plan.schedule.start > 0:
            source = self._encode(self._source_frames(window))
        motion = None
        if mode.carried_condition and carried is not None:
            y, motion = self._condition_channels(carried)
            clip = self._clip(carried[:, -1])
        else:
            y, clip = self._source_condition(window)
            if carried is not None:
                motion = self._encode(carried)
            elif mode.first_motion:
                motion = y[0, 4:, :1]  # the VAE is causal: these are the latents of the image alone
        inputs = WindowInputs(
            piece_of(self.context, window.index),
            self.negative,
            y=y,
            clip=clip,
            audio=self.audio(window).to(self.device),
            masks=self.masks,
            audio_scale=self.plan.config.audio_scale,
            nag=self.nag,
        )
        front = None
        if motion is not None:
            front = Overwrite(motion, noised=mode.noised, draws=mode.draws and carried is not None)
        return WindowCondition(inputs, tuple(y[0, 4:].shape), front, source)

    def prepare(self, window: Window) -> None:
        """Begin to read the source frames of the window behind this one, while this one is computed."""
        if window.index + 1 >= len(self.plan.windows):
            return
        following = self.plan.windows[window.index + 1]
        shared = self._condition_of is not None and self._condition_of[0] == self._nearest(following.start)
        if self.plan.schedule.start > 0 or not shared:
            self._read_ahead(following)

    def _read_ahead(self, window: Window) -> None:
        self._ahead = (window.index, self._reader.submit(self._read, window))

    def _source_frames(self, window: Window) -> Tensor:
        """Those that the window needs, [3, F, H, W] in [-1, 1]: the one where it starts, or all, if it starts late."""
        if self._ahead is None or self._ahead[0] != window.index:
            self._read_ahead(window)
        assert self._ahead is not None
        return self._ahead[1].result()

    def _read(self, window: Window) -> Tensor:
        end = window.end if self.plan.schedule.start > 0 else window.start + 1
        return torch.stack([self.image(frame) for frame in range(window.start, end)], dim=1)

    def audio(self, window: Window) -> Tensor:
        """Features of the speech in the window, [speakers, frames, 5, layers, hidden]."""
        speech = self.given.audio
        if not isinstance(speech, Sequence):
            return speech(window)
        return with_silence(window_audio(speech, window, self.plan.total), self.plan.masks)

    def image(self, index: int) -> Tensor:
        """Source frame [3, H, W] in [-1, 1]; beyond either end the nearest one."""
        frame = self.given.source[self._nearest(index)]
        return cover_image(load_image(frame), self.plan.width, self.plan.height)

    def _nearest(self, index: int) -> int:
        return min(max(index, 0), len(self.given.source) - 1)

    def _source_condition(self, window: Window) -> tuple[Tensor, Tensor | None]:
        """y and image tokens of the source frame where the window starts, kept for the windows that share it."""
        index = self._nearest(window.start)
        if self._condition_of is None or self._condition_of[0] != index:
            image = self._source_frames(window)[:, :1]
            y, _ = self._condition_channels(image)
            self._condition_of = (index, y, self._clip(image[:, 0]))
        return self._condition_of[1:]

    def _condition_channels(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Known first frames [3, K, H, W] -> (y [1, 20, T, h, w], their latents [16, Tk, h, w]); the rest is gray."""
        gray = known.new_zeros(3, self.plan.config.frames - known.shape[1], *known.shape[2:])
        latents = self._encode(torch.cat([known, gray], dim=1))  # [16, T, h, w]
        front = latent_frames(known.shape[1])
        mask = latents.new_zeros(4, *latents.shape[1:])
        mask[:, :front] = 1
        return torch.cat([mask, latents]).unsqueeze(0), latents[:, :front]

    def _encode(self, frames: Tensor) -> Tensor:
        """[3, F, H, W] -> [16, T, h, w]"""
        with self.stage("vae"):
            latents = self.vae.encode(frames.unsqueeze(0).to(self.device), tiled=self.plan.config.tiled_vae)
        return latents[0].to(self.device, torch.float32)

    def _clip(self, image: Tensor) -> Tensor | None:
        if self.clip is None:
            return None
        with self.stage("clip"):
            return self.clip.encode(image.unsqueeze(0).to(self.device)).to(self.device)


def _check_conditioning(given: Conditioning, plan: Plan) -> None:
    if len(given.source) < 1:
        raise InputError("The source video holds no frame: give another.")
    speech = given.audio if isinstance(given.audio, Sequence) else None
    if speech is not None:
        _check_features(speech, plan)
    if not isinstance(given.context, Sequence) or not given.context:
        raise InputError("The prompt is a sequence of embeddings [n, text_dim], one or more: put one into a list.")
    windows = len(plan.windows)
    if len(given.context) > windows:
        logger.warning(
            "The prompt has %d pieces, the video %d windows: the rest is not used", len(given.context), windows
        )
    if plan.mode.distilled and len(given.context) > 1:
        raise InputError(f"The mode {plan.config.mode} has one prompt for the whole video, not {len(given.context)}.")
    if plan.mode.distilled and len(given.source) > 1:
        raise InputError(f"The mode {plan.config.mode} takes one image, not {len(given.source)}: give the first alone.")
    named = [("speech features", f) for f in speech or ()] + [("prompt", piece) for piece in given.context]
    named.append(("negative", given.negative))
    if given.nag is not None:
        named.append(("negative (NAG)", given.nag.negative))
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"The {name} embedding holds NaN or infinite values: check the encoder and its input.")


def _check_features(speech: Sequence[Tensor], plan: Plan) -> None:
    if len(speech) != plan.speakers:
        raise InputError(f"Speech features of {len(speech)} speakers for a plan of {plan.speakers}: plan anew.")
    shapes = {tuple(features.shape[1:]) for features in speech}
    if len(shapes) != 1 or any(features.ndim != 3 or len(features) == 0 for features in speech):
        raise InputError(f"Speech features {sorted(shapes)} do not fit: give [rows, layers, hidden], alike for all.")


# --- condition channels of single windows ------------------------------------------------------------------------


@dataclass(frozen=True)
class Keyframes:
    """Images that a window is to contain.

    Attributes:
        start: first frames [N, 3, H, W] in [-1, 1].
        end: last frames, likewise.
        empty: what fills the frames between [N, 3, H, W], its last one going on; gray without it.
        given: [F] or [F, h, w], 1 where a frame (or a place in it) is given; instead of first and last.
        start_strength, end_strength: factors on the latents of the first and of the last frame.
        noise: standard deviation of noise on the given images; `empty_noise`: in the frames between.
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

    Raises InputError for lengths that are not 4n + 1 or too short for the images.
    """
    if frames < 1 or frames % 4 != 1:
        raise InputError(f"{frames} frames are not 4n + 1: set num_frames to {max(1, frames // 4 * 4 + 1)}.")
    first = 0 if keys.start is None else len(keys.start)
    last = 0 if keys.end is None else len(keys.end)
    if first + last > frames:
        raise InputError(f"{first + last} given images do not fit into {frames} frames: give fewer.")
    generator = torch.Generator("cpu").manual_seed(seed)

    def noisy(images: Tensor, strength: float) -> Tensor:
        if strength == 0:
            return images
        return images + strength * torch.randn(images.shape, generator=generator).to(images)

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
    by_latent_frame: torch.Tensor = groups.unflatten(0, (-1, 4)).transpose(0, 1)
    return by_latent_frame
