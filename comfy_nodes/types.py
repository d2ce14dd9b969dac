"""What travels on the wires between our nodes: small typed values, no model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..pipeline.plan import mode_by_name
from ..wanvideo.errors import InputError
from ..wanvideo.modules.techniques import NormalizedAttention

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
