"""Where a service keeps its files, and the job that a request stands for.

    jobs.sqlite                          the queue
    service.lock, worker-N.lock          held while these processes live
    clients/NAME/uploads/KIND/ID         what a client sent
    clients/NAME/jobs/ID/video.mp4       what was made of it

All names are made here, of names and ids of one strict form: nothing that a client sends becomes part of a path.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..media.video import OutputFiles
from ..pipeline.make_video import Job
from ..wanvideo.errors import InputError
from .queue import Queue, Record
from .settings import build

__all__ = ["CLIENT", "FILES", "ServiceFolder", "new_id"]

FILES = {"image": "image", "video": "video", "audio": "audio", "masks": "mask", "references": "image"}
"""Field of a request -> the kind of the uploads that it names; the last three are `LISTS`."""

LISTS = ("audio", "masks", "references")

CLIENT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class ServiceFolder:
    """The files of a service in `path`."""

    path: Path

    @classmethod
    def make(cls, path: str | Path) -> ServiceFolder:
        """Raises InputError where the folder cannot be made."""
        folder = Path(path).expanduser().resolve()
        try:
            (folder / "clients").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"The folder {path} cannot be used: {error.strerror or error}.") from error
        return cls(folder)

    def queue(self, retries: int = 1) -> Queue:
        return Queue(self.path / "jobs.sqlite", retries)

    def lock(self, slot: int | None = None) -> Path:
        """Of the service, or of a worker."""
        return self.path / ("service.lock" if slot is None else f"worker-{slot}.lock")

    def uploads(self, client: str) -> Path:
        return self._of(client) / "uploads"

    def upload(self, client: str, kind: str, id: str) -> Path:
        """Of this kind, one of `requests.KINDS`. Raises KeyError for what is no id."""
        return self.uploads(client) / kind / _checked(id)

    def output(self, client: str, id: str) -> OutputFiles:
        """The video of a job. Raises KeyError for what is no id."""
        return OutputFiles.of(self._of(client) / "jobs" / _checked(id) / "video.mp4")

    def job(self, record: Record, base: Mapping[str, Any]) -> Job:
        """The job of a record; `base`: the service's own settings, see `settings.build`."""
        return self.job_of(record.id, record.client, record.request, base)

    def job_of(self, id: str, client: str, request: Mapping[str, Any], base: Mapping[str, Any]) -> Job:
        """The job of a request, whose files are ids of the client's uploads."""
        inputs = self.inputs(client, request).items()
        files = {name: paths if name in LISTS else paths[0] for name, paths in inputs}
        return build(base, {**request, **files, "out": self.output(client, id).video})

    def inputs(self, client: str, request: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
        """Field of a request -> the client's uploads that it names."""
        given = {name: request[name] for name in FILES if request.get(name) is not None}
        return {
            name: tuple(self.upload(client, FILES[name], id) for id in ([ids] if isinstance(ids, str) else ids))
            for name, ids in given.items()
        }

    def _of(self, client: str) -> Path:
        if not CLIENT.fullmatch(client):
            raise InputError(f"'{client}' is no name of a client: use up to 32 lower-case letters, digits and hyphens.")
        return self.path / "clients" / client


def _checked(id: str) -> str:
    if not ID.fullmatch(id):
        raise KeyError(id)
    return id
