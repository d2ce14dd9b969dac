"""What may change the steps of a generation without training: for which steps and passes. By default nothing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..wanvideo.errors import InputError
from ..wanvideo.modules.model import WanConfig
from .blocks import check_blocks
from .guidance import Formula, Pass
from .step_cache import StepCache, profiled

__all__ = ["EnhanceVideo", "SkipLayers", "Technique", "cache_of", "check_techniques", "fitted", "forward_options"]


@dataclass(frozen=True)
class EnhanceVideo:
    """Enhance-A-Video: self-attention across frames is strengthened, see `cross_frame_gain`.

    Attributes:
        weight: the temperature; larger is stronger.
        start_percent, end_percent: the steps i of n with i / n within them, 0 to 1.
    """

    weight: float = 2.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def options(self, which: Pass) -> dict[str, Any]:
        return {"enhance": self.weight}


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: passes with the negative prompt leave blocks out, so that guidance leads away from what a
    weaker model makes (Hyung et al. 2024, arXiv 2411.18664, for video models).

    Attributes:
        blocks: indices of the blocks.
        start_percent, end_percent: as of `EnhanceVideo`.
    """

    blocks: tuple[int, ...]
    start_percent: float = 0.1
    end_percent: float = 1.0

    def options(self, which: Pass) -> dict[str, Any]:
        return {} if which.prompt else {"skip_blocks": self.blocks}


Technique = EnhanceVideo | SkipLayers | StepCache


def cache_of(techniques: Sequence[Technique]) -> StepCache | None:
    """The step cache among them; of several the last."""
    return next((technique for technique in reversed(techniques) if isinstance(technique, StepCache)), None)


def check_techniques(techniques: Sequence[Technique], formulas: Sequence[Formula]) -> None:
    """Raise InputError for parts of a run that are none, and where a technique finds no pass that it could change."""
    for technique in techniques:
        if isinstance(technique, StepCache):
            continue
        start, end = technique.start_percent, technique.end_percent
        if not 0 <= start <= end <= 1:
            raise InputError(f"The part from {start} to {end} is none: start_percent below end_percent, within 0 to 1.")
    negative = any(not which.prompt for formula in formulas for which in formula.passes)
    if not negative and any(isinstance(technique, SkipLayers) for technique in techniques):
        raise InputError(
            "Layers are skipped in the passes with the negative prompt, and cfg 1 makes none: set cfg above 1, or "
            "leave skip-layer guidance out."
        )


def fitted(techniques: Sequence[Technique], config: WanConfig, name: str) -> tuple[Technique, ...]:
    """The techniques as they are for a model: with what was measured of it, where a step cache needs that.

    Args:
        name: of the model's file.

    Raises InputError for blocks that the model has not, and where nothing was measured.
    """
    for technique in techniques:
        if isinstance(technique, SkipLayers):
            check_blocks(technique.blocks, config.num_layers)
    return tuple(profiled(t, config, name) if isinstance(t, StepCache) else t for t in techniques)


def forward_options(techniques: Sequence[Technique], which: Pass, step: int, steps: int) -> dict[str, Any]:
    """Arguments of `WanModel.forward` in this pass of step `step` of `steps`; none where nothing holds."""
    options: dict[str, Any] = {}
    for technique in techniques:
        if isinstance(technique, StepCache):
            continue  # it decides by itself, see `step_cache`
        if technique.start_percent <= step / steps <= technique.end_percent:
            options |= technique.options(which)
    return options
