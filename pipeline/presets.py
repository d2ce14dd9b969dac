"""Named settings: one table for the command, the nodes and other programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from ..wanvideo.checkpoints.dit import inspect_dit
from ..wanvideo.checkpoints.files import read_metadata
from ..wanvideo.checkpoints.reading import json_object
from ..wanvideo.errors import CheckpointError, InputError
from .bounds import BOUNDS
from .make_video import NO_FILE, Job
from .plan import FLASHTALK, HUMO, GenerateConfig

__all__ = [
    "PRESETS",
    "SETTINGS",
    "build_job",
    "mode_defaults",
    "preset_values",
    "settings_as_json",
    "stated_defaults",
]

logger = logging.getLogger(__name__)

QUALITY: dict[str, Any] = {"steps": 40, "shift": 7.0, "cfg": 5.0, "audio_cfg": 4.0}
"""The public defaults at 480p: 40 steps of three passes each."""

HUMO_17B: dict[str, Any] = {"steps": 50, "shift": 5.0, "scheduler": "unipc", "cfg": 5.0, "audio_cfg": 5.5}
HUMO_1_7B = HUMO_17B | {"cfg": 7.0, "audio_cfg": 7.5, "image_cfg": 4.0}
"""The public settings of HuMo's two models."""

STREAM: dict[str, Any] = {
    "frames": 33,
    "motion_frames": 5,
    "steps": 4,
    "shift": 5.0,
    "scheduler": "flashtalk",
    "cfg": 1.0,
    "audio_cfg": 1.0,
    "color_method": "flashtalk",
}
FLASHTALK_14B = STREAM | {"width": 448, "height": 768}
"""The public settings of SoulX-FlashTalk."""

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 4, "cfg": 1.0, "audio_cfg": 1.0},
    "quality": QUALITY,
    "low-memory": QUALITY
    | {
        "blocks_to_swap": 40,
        "quantization": "fp8_e4m3fn_scaled",
        "tiled_vae": True,
        "text_encoder_device": "cpu",  # UMT5-XXL would take more of the GPU than all the rest
    },
    "stream": STREAM | {"mode": FLASHTALK},
}
"""Name -> fields of `GenerateConfig` and `Job` with their values."""

DISTILLED = ("fast",)
"""Presets whose few steps need a model, or a LoRA, that was trained for them."""

_CONFIG = {field.name for field in fields(GenerateConfig)} - {field.name for field in fields(Job)}


def preset_values(name: str) -> dict[str, Any]:
    """Every field of `GenerateConfig` and `Job` that has a default, as the preset sets it, else that default.

    Raises InputError for a preset that does not exist.
    """
    defaults = {
        entry.name: entry.default
        for kind in (GenerateConfig, Job)
        for entry in fields(kind)
        if entry.default is not MISSING
    }
    return defaults | _preset(name)


def _preset(name: str | None) -> dict[str, Any]:
    if name is not None and name not in PRESETS:
        raise InputError(f"There is no preset '{name}': choose one of {', '.join(PRESETS)}.")
    return {} if name is None else PRESETS[name]


NOT_SETTINGS = {
    *("files", "audio", "out", "image", "video", "masks", "references", "loras"),  # files
    *("device", "text_encoder_device", "base_dtype", "fp16_accumulation", "compile_settings"),  # the owner's
    *("gpus", "guidance_gpus"),  # likewise
    *("config", "total_frames", "resume", "comment"),  # follow from the job
    "techniques",  # objects
}
"""Fields of `GenerateConfig` and `Job` that are no `SETTINGS`."""

SETTINGS: dict[str, Any] = {
    name: value for name, value in preset_values(next(iter(PRESETS))).items() if name not in NOT_SETTINGS
} | {"preset": None}
"""What decides how a video looks, beside files: name -> a value of its type; numbers, texts, true or false."""


def settings_as_json(job: Job, preset: str | None = None) -> str:
    """All `SETTINGS` of a job as a JSON object; with the preset, if there is one, that its values come from."""
    values = {name: getattr(job if hasattr(job, name) else job.config, name) for name in SETTINGS if name != "preset"}
    text = json.dumps(({"preset": preset} if preset else {}) | values, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()  # halves of characters, as a command line may hold


def stated_defaults(model: str | Path) -> dict[str, Any]:
    """Settings that a model's file states for itself, fields of `GenerateConfig` ("defaults" in its metadata, JSON).

    What is no such setting is left out with a warning; a file that cannot be read states none.
    """
    try:
        stated = json_object(read_metadata(model).get("defaults"), f"The defaults in {model}")
    except (CheckpointError, OSError, RuntimeError) as error:  # said, if it matters, where the model is read
        logger.debug("%s", error)
        return {}
    taken = {name: value for name, value in stated.items() if name in BOUNDS.keys() & _CONFIG}
    taken = {name: value for name, value in taken.items() if BOUNDS[name].accepts(value)}
    if left_out := stated.keys() - taken.keys():
        logger.warning("Defaults in %s that are no such settings are left out: %s", model, ", ".join(sorted(left_out)))
    return taken


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def mode_defaults(mode: str | None, model: str | Path, preset: str | None = None) -> dict[str, Any]:
    """Settings of a mode whose public ones are not those of InfiniteTalk; of HuMo's two models by the file's header.

    Args:
        mode: None: that of the preset, where it has one.
    """
    mode = mode or PRESETS.get(preset or "", {}).get("mode")
    if mode == FLASHTALK:
        return FLASHTALK_14B
    if mode != HUMO:
        return {}
    try:
        config = inspect_dit(model)
    except (CheckpointError, InputError) as error:  # said where the model is read
        logger.debug("%s", error)
        return HUMO_17B
    return HUMO_17B if config.in_dim > config.out_dim else HUMO_1_7B


def build_job(settings: Mapping[str, Any], preset: str | None = None, defaults: Mapping[str, Any] | None = None) -> Job:
    """The job of `settings`, and of a preset, then of `defaults`, where they say nothing.

    Its video, where it is a file, carries all of them, see `settings_as_json`.

    Args:
        settings: fields of `Job` but `config`, and of `GenerateConfig`; what both have is the job's.
        preset: one of `PRESETS`.
        defaults: of the model, see `stated_defaults` and `mode_defaults`.

    Raises InputError for a preset that does not exist.
    """
    chosen = {**_preset(preset), **settings}
    own = {name: value for name, value in (defaults or {}).items() if name not in chosen}
    if chosen.keys() & {"width", "height"}:  # one alone follows the image's aspect
        own = {name: value for name, value in own.items() if name not in ("width", "height")}
    if own:
        logger.info("The model's own defaults: %s", ", ".join(f"{name} {_short(value)}" for name, value in own.items()))
    chosen |= own
    if preset in DISTILLED and not any(lora.strength for lora in chosen.get("loras", ())):
        logger.warning(
            "The preset %s needs a distilled model, and no LoRA is given: with any other, choose a step LoRA such as "
            "lightx2v's.",
            preset,
        )
    config = GenerateConfig(**{name: value for name, value in chosen.items() if name in _CONFIG})
    job = Job(config=config, **{name: value for name, value in chosen.items() if name not in _CONFIG})
    return job if str(job.out) == NO_FILE else replace(job, comment=settings_as_json(job, preset))
