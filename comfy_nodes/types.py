"""What travels on the wires between our nodes: small typed values, no model code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..pipeline.bounds import BOUNDS, Bound, shown
from ..pipeline.plan import mode_by_name
from ..wanvideo.errors import InputError
from ..wanvideo.modules.techniques import NormalizedAttention

logger = logging.getLogger(__name__)

LEVELS = (-0.5, 10.0)
"""What pixels may be: 0 to 1, and what resizing and high dynamic range add; not -1 to 1, and not 0 to 255."""


def checked_image(image: Any) -> torch.Tensor:
    """An IMAGE, float pixels [N, H, W, 1, 3 or 4] from 0 to 1, as it came; gray as RGB.

    Raises InputError for another form, an image without pixels, and values that are NaN or outside of `LEVELS`.
    """
    if not isinstance(image, torch.Tensor):
        raise InputError(f"An image came as {type(image).__name__}: connect an IMAGE, as from Load Image.")
    shape = list(image.shape)
    if len(shape) != 4 or shape[-1] not in (1, 3, 4) or 0 in shape or not image.is_floating_point():
        raise InputError(
            f"An image of shape {shape} and {image.dtype} cannot be used: it takes floats of shape [images, height, "
            "width, 3]."
        )
    least, most = (float(level) for level in image.aminmax())
    if not LEVELS[0] <= least <= most <= LEVELS[1]:  # nor NaN
        raise InputError(f"An image has levels from {least:g} to {most:g}: those of an IMAGE are 0 to 1.")
    return image.expand(*shape[:3], 3) if shape[-1] == 1 else image


def checked_audio(audio: Any) -> tuple[torch.Tensor, int]:
    """(samples [B, channels, n], rate in Hz) of an AUDIO. Raises InputError for another form, and without samples."""
    waveform, rate = (audio.get(key) if isinstance(audio, Mapping) else None for key in ("waveform", "sample_rate"))
    if not isinstance(waveform, torch.Tensor) or not isinstance(rate, int | float):
        raise InputError("There is no recording: connect an AUDIO, as from Load Audio.")
    if waveform.ndim != 3 or 0 in waveform.shape or not waveform.is_floating_point():
        raise InputError(
            f"A recording of shape {list(waveform.shape)} and {waveform.dtype} cannot be used: it takes floats of "
            "shape [1, channels, samples]."
        )
    return waveform, int(rate)


@dataclass(frozen=True)
class Adapter:
    """An InfiniteTalk or MultiTalk adapter file."""

    path: Path

    @property
    def mode(self) -> str:
        """How its windows follow each other, read from the name of the file."""
        return mode_by_name(self.path) or "multitalk"


@dataclass(frozen=True)
class TextEmbeds:
    """Prompt embeddings [tokens, text_dim], one for each window; the negative one is used where cfg is not 1.

    `nag` has another negative one, which is used inside the model.
    """

    positive: tuple[torch.Tensor, ...]
    negative: torch.Tensor | None = None
    nag: NormalizedAttention | None = None


@dataclass(frozen=True)
class ClipEmbeds:
    """CLIP image features [1, tokens, 1280] of the start image, and of an image to move away from."""

    positive: torch.Tensor
    negative: torch.Tensor | None = None


@dataclass(frozen=True)
class SpeechEmbeds:
    """wav2vec2 features [frames, layers, hidden], one per speaker, with what guides them."""

    speakers: tuple[torch.Tensor, ...]
    num_frames: int
    fps: float = 25.0
    audio_scale: float = 1.0
    audio_cfg: float = 1.0
    masks: torch.Tensor | None = None  # [speakers, H, W], 1 where the speaker is
    audio: dict[str, Any] | None = field(default=None, compare=False)  # what the video will sound like

    def mapping(self) -> dict[str, Any]:
        """MULTITALK_EMBEDS, as nodes of this pack and of others read and change it; `of` is the way back.

        "num_frames", "fps" and "audio" are this pack's own entries. Of silence the list of features is empty.
        """
        return {
            "audio_features": list(self.speakers),
            "audio_scale": self.audio_scale,
            "audio_cfg_scale": self.audio_cfg,
            "ref_target_masks": self.masks,
            "num_frames": self.num_frames,
            "fps": self.fps,
            "audio": self.audio,
        }

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SpeechEmbeds:
        """What a MULTITALK_EMBEDS says. "audio_features" must be there; without the others it is as if they were not
        set, and the video is as long as the longest speech, at 25 frames per second.

        Raises InputError for entries of another form, and for more frames than a video may have. The log names entries
        that nothing here reads.
        """
        unread = [name for name in given if name not in _SPEECH_ENTRIES]
        if unread:
            logger.warning("multitalk_embeds holds %s, which is not used here.", ", ".join(map(str, unread)))
        speakers = tuple(_checked_features(given.get("audio_features")))
        longest = max((len(rows) for rows in speakers), default=None)
        values = {name: value for name, value in given.items() if name in _SPEECH_ENTRIES and value is not None}
        numbers = {"audio_scale": 1.0, "audio_cfg_scale": 1.0, "fps": 25.0, "num_frames": longest} | {
            name: values[name] for name in _SPEECH_NUMBERS if name in values
        }
        for name, bound in _SPEECH_NUMBERS.items():
            if not bound.accepts(numbers[name]):
                raise InputError(
                    f"{name} {shown(numbers[name])} of multitalk_embeds cannot be used: give {bound.words}."
                )
        masks = values.get("ref_target_masks")
        if masks is not None and not (isinstance(masks, torch.Tensor) and masks.ndim in (2, 3) and masks.numel()):
            raise InputError(
                f"ref_target_masks of multitalk_embeds is {_form(masks)}: it takes a MASK, [speakers, height, width]."
            )
        audio = values.get("audio")
        if audio is not None:
            checked_audio(audio)
        return cls(
            speakers,
            numbers["num_frames"],
            numbers["fps"],
            numbers["audio_scale"],
            numbers["audio_cfg_scale"],
            masks,
            audio,
        )


_SPEECH_ENTRIES = tuple(SpeechEmbeds((), 1).mapping())

_SPEECH_NUMBERS = {
    "audio_scale": BOUNDS["audio_scale"],
    "audio_cfg_scale": BOUNDS["audio_cfg"],
    "fps": Bound(1, 60),
    "num_frames": replace(BOUNDS["max_frames"], optional=False),
}


def _checked_features(features: Any) -> list[torch.Tensor]:
    """Features per speaker on the CPU, float32. Raises InputError for another form, and for NaN and infinity."""
    if not isinstance(features, (list, tuple)) or not all(isinstance(rows, torch.Tensor) for rows in features):
        raise InputError(
            f"audio_features of multitalk_embeds is {_form(features)}: it takes a list of tensors, one per speaker."
        )
    for rows in features:
        if rows.ndim != 3 or 0 in rows.shape or not rows.is_floating_point():
            raise InputError(
                f"audio_features of multitalk_embeds has {_form(rows)}: it takes floats of shape [frames, layers, "
                "width] for each speaker."
            )
        if not bool(torch.isfinite(rows).all()):
            raise InputError("audio_features of multitalk_embeds has NaN or infinity: encode the recording again.")
    forms = {tuple(rows.shape[1:]) for rows in features}
    if len(forms) > 1:
        raise InputError(
            f"audio_features of multitalk_embeds has speakers of {len(forms)} forms ({_words(forms)}): encode all of "
            "them with one wav2vec2 model."
        )
    return [rows.detach().float().cpu() for rows in features]


def _words(forms: set[tuple[int, ...]]) -> str:
    return " and ".join(str(list(form)) for form in sorted(forms))


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    return "missing" if value is None else f"a {type(value).__name__}"


@dataclass(frozen=True)
class LongVideo:
    """What InfiniteTalk Long Video states about the video; the sampler makes the windows."""

    vae: Any  # VaeModel
    width: int
    height: int
    frames: int
    motion_frames: int
    start_images: torch.Tensor | None  # [N, H, W, 3] in [0, 1]
    clip: ClipEmbeds | None
    mode: str  # "auto", or a mode of long videos
    color_match: str  # one of `media.color.COLOR_METHODS`, or "disabled"
    tiled: bool
    offload_between: bool
    output_path: str


@dataclass(frozen=True)
class OneWindow:
    """A video of one window: its size and, for I2V, the condition channels [20, T, h, w] and CLIP features."""

    width: int
    height: int
    num_frames: int
    condition: torch.Tensor | None = None
    clip: ClipEmbeds | None = None


@dataclass(frozen=True)
class HuMoVideo:
    """What InfiniteTalk HuMo states about the video; the sampler encodes the images for the model that it is given."""

    vae: Any  # VaeModel, or None
    width: int
    height: int
    frames: int
    images: tuple[torch.Tensor, ...]  # [3, height, width] in [-1, 1]
    audio: torch.Tensor | None  # [rows, groups, width], 25 rows a second
    audio_scale: float
    audio_cfg: float
    span: tuple[float, float]  # part of the steps in which the speech is heard
    tiled: bool
    guidance: str  # one of `humo.FORMULAS`


class SigmaLevel(float):
    """A noise level in place of a step: the first step of the schedule whose sigma is at or below it."""


@dataclass(frozen=True)
class VramManagement:
    """How much of a model's blocks to swap, 0 to 1."""

    share: float


@dataclass(frozen=True)
class SchedulerChoice:
    """The sampler's inputs that a scheduler node holds, by their names."""

    scheduler: str
    steps: int
    shift: float
    start_step: int
    end_step: int
    sigmas: torch.Tensor | None


@dataclass(frozen=True)
class ExtraArgs:
    """Optional inputs of the sampler, by name."""

    given: Mapping[str, Any]


@dataclass(frozen=True)
class SamplerArgs:
    """All inputs of the sampler, by name."""

    given: Mapping[str, Any]
