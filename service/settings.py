"""What a job may say in JSON: fields of `Job` and `GenerateConfig`, and a preset by its name.

Files, devices and what the service's owner decides are not among them. Values are held to their JSON type and to
`bounds.BOUNDS` here; what they mean is checked where it is for everybody, in `make_video.check`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..fp8_optimization import QUANTIZATIONS
from ..media.color import COLOR_METHODS
from ..media.video import read_comment
from ..pipeline.attention_policy import POLICIES
from ..pipeline.bounds import BOUNDS, check_numbers, shown
from ..pipeline.guidance import FORMULAS
from ..pipeline.make_video import Job
from ..pipeline.plan import MODES, SPEECH_ENCODINGS
from ..pipeline.presets import PRESETS, SETTINGS, build_job, mode_defaults, stated_defaults
from ..pipeline.schedulers import SCHEDULERS
from ..wanvideo.encoders.text import TEXT_QUANTIZATIONS
from ..wanvideo.errors import InputError, nearest
from ..wanvideo.modules.attention import ATTENTION_MODES

__all__ = ["build", "read_json", "schema", "settings_in", "settings_of"]

CHOICES = {
    "preset": tuple(PRESETS),
    "mode": tuple(MODES),
    "scheduler": SCHEDULERS,
    "guidance": FORMULAS,
    "color_method": COLOR_METHODS,
    "speech_encoding": SPEECH_ENCODINGS,
    "attention_policy": tuple(POLICIES),
    "attention_mode": ATTENTION_MODES,
    "quantization": tuple(QUANTIZATIONS),
    "text_encoder_quantization": tuple(TEXT_QUANTIZATIONS),
}
"""Settings that are a name. Those of modes and quantizations are spelled in many ways, which their readers know."""

MOST_OF_A_JOB = 2**20
"""Bytes of a job's JSON."""

MOST_CHARACTERS = 10_000
"""Of a text: the text encoder reads 512 tokens."""


def read_json(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`; numbers are finite and names stand once. Raises InputError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return found

    def finite(given: str) -> float:
        if not math.isfinite(value := float(given)):
            raise ValueError(f"{given} is no finite number")
        return value

    try:
        found = json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_float=finite)
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters
    except (ValueError, RecursionError) as error:
        raise InputError(f'{what} is not JSON ({error}): give an object such as {{"steps": 8}}.') from error
    if not isinstance(found, dict):
        raise InputError(f'{what} is {shown(found)}: give an object such as {{"steps": 8}}.')
    return found


def settings_of(given: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """What is given but the fields `files`, which the caller reads.

    Raises InputError for the first field that does not exist, or whose value is not of its type and bounds.
    """
    settings = {name: value for name, value in given.items() if name not in files}
    for name, value in settings.items():
        if name not in SETTINGS:
            raise InputError(f"There is no field {shown(name)}{nearest(name, [*files, *SETTINGS])}.")
        if name in BOUNDS:
            check_numbers(**{name: value})
        elif isinstance(SETTINGS[name], bool):
            if not isinstance(value, bool):
                raise InputError(f"{name} {shown(value)} cannot be used: give true or false.")
        elif value is None and SETTINGS[name] is None:
            continue  # not chosen
        elif not isinstance(value, str) or len(value) > MOST_CHARACTERS:
            raise InputError(f"{name} {shown(value)} cannot be used: give a text of up to {MOST_CHARACTERS:,} letters.")
    return settings


def settings_in(video: Path) -> dict[str, Any]:
    """The settings that a video carries, each held to its type and bounds as those of a request are.

    Raises InputError for a file that is no video, that carries none, and for the first of them that is not right.
    """
    comment = read_comment(video)
    if not comment.startswith("{") or len(comment.encode()) > MOST_OF_A_JOB:
        raise InputError(
            f"{video.name} carries no settings: choose a video that this service, infinitetalk generate or batch made."
        )
    settings = read_json(comment, f"What {video.name} carries")
    try:
        return settings_of(settings, ())
    except InputError as error:
        raise InputError(f"The settings in {video.name} cannot be used. {error}") from error


def schema() -> dict[str, Any]:
    """The settings as properties of a JSON schema."""
    return {name: _schema_of(name, value) for name, value in SETTINGS.items()}


def _schema_of(name: str, value: Any) -> dict[str, Any]:
    if name in BOUNDS:
        bound = BOUNDS[name]
        least = "exclusiveMinimum" if bound.positive else "minimum"
        one = {"type": "integer" if bound.whole else "number", least: bound.least, "maximum": bound.most}
        kinds = [one, *([{"type": "array", "items": one}] if bound.per_step else [])]
        kinds += [{"type": "null"}] if bound.optional else []
        return one if len(kinds) == 1 else {"anyOf": kinds}
    if isinstance(value, bool):
        return {"type": "boolean"}
    text: dict[str, Any] = {"type": "string", "maxLength": MOST_CHARACTERS}
    text |= {"enum": list(CHOICES[name])} if name in CHOICES else {}
    return text if value is not None else {"anyOf": [text, {"type": "null"}]}


def build(base: Mapping[str, Any], given: Mapping[str, Any]) -> Job:
    """The job of what its client has `given`, and where that says nothing, of `base`, the service's own settings.

    Args:
        base, given: fields of `Job` and `GenerateConfig`, and `preset`. A preset that the client names replaces what it
            stands for in `base`.

    Raises InputError for a preset that does not exist.
    """
    preset = given.get("preset")
    base = {name: value for name, value in base.items() if name not in PRESETS.get(preset or "", {})}
    settings = {"audio": (), **base, **given}
    preset = settings.pop("preset", None)
    model = settings["files"].model
    defaults = mode_defaults(settings.get("mode"), model, preset) | stated_defaults(model)
    return build_job(settings, preset, defaults)
