"""What travels on the wires between our nodes: small typed values, no model code."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..pipeline.plan import mode_by_name


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
    """Prompt embeddings [tokens, text_dim], one for each window; the negative one is used where cfg is not 1."""

    positive: tuple[torch.Tensor, ...]
    negative: torch.Tensor | None = None


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


# Strength of the color correction for each value of colormatch that we run.
COLOR_STRENGTH = {"disabled": 0.0, "reinhard": 1.0}


@dataclass(frozen=True)
class LongVideo:
    """What WanVideo Long I2V Multi/InfiniteTalk states about the video; the sampler makes the windows."""

    vae: Any  # VaeModel
    width: int
    height: int
    frames: int
    motion_frames: int
    start_images: torch.Tensor | None  # [N, H, W, 3] in [0, 1]
    clip: ClipEmbeds | None
    mode: str  # "auto", "infinitetalk" or "multitalk"
    color_match: str  # a key of COLOR_STRENGTH
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
