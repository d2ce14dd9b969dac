"""Many videos in one process, one after the other, with models that stay loaded: `infinitetalk batch JOBS.jsonl`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..media.video import OutputFiles
from ..pipeline.bounds import shown
from ..pipeline.loaded_models import LoadedModels
from ..pipeline.make_video import Events, Job, Result
from ..pipeline.plan import HUMO
from ..wanvideo.errors import InfiniteTalkError, InputError
from .folder import LISTS
from .settings import build, read_json, settings_of
from .worker import make_reusing

__all__ = ["FILES", "Line", "read_jobs", "run_jobs"]

logger = logging.getLogger(__name__)

FILES = ("image", "video", "audio", "masks", "references", "out")
"""What a line names beside its settings: paths, and lists of them for several speakers."""


@dataclass(frozen=True)
class Line:
    """The job of a line, counted from 1."""

    number: int
    job: Job


def read_jobs(path: str | Path, base: Mapping[str, Any]) -> list[Line]:
    """The jobs of a file with a JSON object on each line; empty lines are left out.

    Args:
        path: whose folder relative paths in it start from.
        base: settings of all jobs, see `settings.build`.

    Raises InputError, with the number of the line, for the first that is no job, and for two with the same video.
    """
    path = Path(path)
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The jobs cannot be read from {path}: {error}.") from error
    lines: list[Line] = []
    videos: dict[Path, int] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            job = _job(read_json(text, "it"), path.parent, base)
        except InputError as error:
            raise InputError(f"Line {number} of {path}: {error}") from error
        first = videos.setdefault(OutputFiles.of(job.out).video, number)
        if first != number:
            raise InputError(f"Lines {first} and {number} of {path} make the same video {job.out}: name another one.")
        lines.append(Line(number, job))
    if not lines:
        raise InputError(f"There is no job in {path}: write one JSON object on each line.")
    return lines


def _job(given: Mapping[str, Any], folder: Path, base: Mapping[str, Any]) -> Job:
    settings = settings_of(given, FILES)
    spoken = settings.get("mode", base.get("mode")) != HUMO  # HuMo's videos may be silent
    for name in ("audio", "out") if spoken else ("out",):
        if name not in given:
            raise InputError(f'"{name}" is missing: give {"a recording" if name == "audio" else "the video to write"}.')
    for name in FILES:
        if name in given:
            several = name in LISTS
            values = [given[name]] if several and isinstance(given[name], str) else given[name]
            paths = values if several else [values]
            if not isinstance(paths, list) or not paths or not all(isinstance(one, str) and one for one in paths):
                raise InputError(f"{name} {shown(given[name])} is no path{' and no list of them' * several}.")
            found = tuple(folder / Path(one).expanduser() for one in paths)
            settings[name] = found if several else found[0]
    return build(base, settings)


def run_jobs(
    lines: Sequence[Line], follow: Callable[[Line], Events], *, resume: bool = False
) -> Iterator[tuple[Line, Result | InfiniteTalkError | None]]:
    """Make the videos in order; for each line its result, the error that ended it, or None for one that is there.

    Args:
        resume: keep videos that are there, and go on with those that an earlier run has begun.
    """
    loaded = LoadedModels()
    try:
        for line in lines:
            if resume and OutputFiles.of(line.job.out).video.is_file():
                yield line, None
                continue
            try:
                made: Result | InfiniteTalkError = make_reusing(replace(line.job, resume=resume), follow(line), loaded)
            except InfiniteTalkError as error:
                made = error
            yield line, made
    finally:
        loaded.clear()
