"""Named settings: one table for the command, the nodes and other programs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..wanvideo.errors import InputError
from .make_video import Job
from .plan import GenerateConfig

__all__ = ["PRESETS", "build_job"]

logger = logging.getLogger(__name__)

QUALITY: dict[str, Any] = {"steps": 40, "shift": 7.0, "cfg": 5.0, "audio_cfg": 4.0}
"""The public defaults at 480p: 40 steps of three passes each."""

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 4, "cfg": 1.0, "audio_cfg": 1.0},
    "quality": QUALITY,
    "low-memory": QUALITY | {"blocks_to_swap": 40, "quantization": "fp8_e4m3fn_scaled", "tiled_vae": True},
}
"""Name -> fields of `GenerateConfig` and `Job` with their values."""

DISTILLED = ("fast",)
"""Presets whose few steps need a model, or a LoRA, that was trained for them."""

_CONFIG = {field.name for field in fields(GenerateConfig)} - {field.name for field in fields(Job)}


def build_job(settings: Mapping[str, Any], preset: str | None = None) -> Job:
    """The job of `settings`, and of a preset where they say nothing.

    Args:
        settings: fields of `Job` but `config`, and of `GenerateConfig`; what both have is the job's.
        preset: one of `PRESETS`.

    Raises InputError for a preset that does not exist.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"There is no preset '{preset}': choose one of {', '.join(PRESETS)}.")
    chosen = {**(PRESETS[preset] if preset else {}), **settings}
    if preset in DISTILLED and not any(lora.strength for lora in chosen.get("loras", ())):
        logger.warning(
            "The preset %s needs a distilled model, and no LoRA is given: with any other, choose a step LoRA such as "
            "lightx2v's.",
            preset,
        )
    config = GenerateConfig(**{name: value for name, value in chosen.items() if name in _CONFIG})
    return Job(config=config, **{name: value for name, value in chosen.items() if name not in _CONFIG})
