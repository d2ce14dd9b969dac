"""What clients may ask of a service: uploads of certain kinds, jobs of certain fields, each held to its limits.

The HTTP API and the page both ask here, so that one place decides what is accepted and how a job is shown.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..media.audio import read_audio
from ..media.images import load_image
from ..media.masks import load_mask
from ..media.video import VideoFrames
from ..pipeline.bounds import shown
from ..pipeline.make_video import check, named
from ..pipeline.plan import HUMO
from ..wanvideo.errors import InfiniteTalkError, InputError
from .folder import FILES, LISTS, ServiceFolder, new_id
from .queue import PRIORITIES, Queue, Record
from .settings import MOST_OF_A_JOB, settings_of

__all__ = ["KINDS", "LONGEST", "Limits", "Requests", "TooManyError"]

LONGEST = 7 * 24 * 3600.0
"""Seconds that a time limit may have."""

LONGEST_RECORDING = 3600.0
"""Seconds. A compressed file may hold weeks of silence, which memory does not."""

KINDS: dict[str, Callable[[Path], object]] = {
    "image": load_image,
    "mask": load_mask,
    "audio": partial(read_audio, most=LONGEST_RECORDING),
    "video": lambda path: VideoFrames(path)[0],
}
"""Kind of an upload -> its reader, which raises InputError for what it cannot read."""


@dataclass(frozen=True)
class Limits:
    """What one client may ask for: bytes of an upload and of all of them, bytes of a request, jobs that wait."""

    upload: int = 512 * 2**20
    uploads: int = 20 * 2**30
    request: int = MOST_OF_A_JOB
    waiting: int = 100


class TooManyError(InputError):
    """More than a client may have at a time."""


class Requests:
    """The uploads and jobs of all clients of a service.

    Args:
        base: the service's own settings, see `settings.build`.
    """

    def __init__(self, folder: ServiceFolder, base: Mapping[str, Any], limits: Limits | None = None) -> None:
        self.folder, self.base, self.limits = folder, base, limits or Limits()
        self.queue: Queue = folder.queue()
        self._checking = threading.Semaphore(2)  # inputs are decoded whole: so many at a time bound the memory
        self._secret = secrets.token_bytes()

    # --- uploads

    def new_upload(self, client: str, kind: str) -> tuple[str, Path]:
        """The id of a new upload, and the file to write."""
        id = new_id()
        path = self.folder.upload(client, kind, id)
        path.parent.mkdir(parents=True, exist_ok=True)
        return id, path

    def room(self, client: str) -> int:
        """Bytes that the next upload of a client may have."""
        uploads = self.folder.uploads(client)
        used = sum(file.stat().st_size for file in uploads.glob("*/*"))
        return min(self.limits.upload, self.limits.uploads - used)

    @property
    def too_large(self) -> str:
        """What is said of an upload for which there is no room."""
        return (
            f"An upload may have {self.limits.upload:,} bytes, and all of a client {self.limits.uploads:,}: send a "
            "smaller file, or delete what is no longer needed."
        )

    def read(self, kind: str, path: Path) -> None:
        """Raises InputError for an upload that is not of this kind, one of `KINDS`."""
        with self._checking:
            KINDS[kind](path)

    def take(self, client: str, kind: str, path: Path) -> str:
        """The id of a copy of a file. Raises InputError for one that is too large, or not of its kind."""
        if path.stat().st_size > self.room(client):
            raise TooManyError(self.too_large)
        id, upload = self.new_upload(client, kind)
        try:
            shutil.copyfile(path, upload)
            self.read(kind, upload)
        except BaseException:
            upload.unlink(missing_ok=True)
            raise
        return id

    def delete_upload(self, client: str, id: str) -> bool:
        """Whether there was one to delete."""
        found = self._find(client, id, KINDS)
        if found is not None:
            found.unlink(missing_ok=True)
        return found is not None

    # --- jobs

    def accept(self, given: dict[str, Any], client: str) -> Record:
        """Queue a job, once all that `make_video` checks before it reads weights is right.

        Raises InputError and CheckpointError for what is not, and TooManyError where too many jobs wait.
        """
        priority, limit = _orders(given)
        wanted = self._checked(given, client)
        if self.queue.counts(client)["queued"] >= self.limits.waiting:
            raise TooManyError(f"{self.limits.waiting} of your jobs wait already: send more when some have begun.")
        id = new_id()
        try:
            job = named(self.folder.job_of(id, client, wanted, self.base))
            with self._checking:
                # Whether the attention mode runs there, the worker's GPU says.
                check(
                    replace(job, device="cpu", text_encoder_device="cpu", attention_mode="sdpa", compile_settings=None)
                )
        except InfiniteTalkError:
            self._remove_files(client, id)
            raise
        return self.queue.add(id, client, wanted, priority, limit)

    def owned(self, id: str, client: str) -> Record | None:
        """A job of this client; None where it has none of this id."""
        try:
            job = self.queue.get(id)
        except KeyError:
            return None
        return job if job.client == client else None

    def delete(self, job: Record) -> bool:
        """Delete a job and its video; False where it has not ended."""
        deleted = self.queue.delete(job.id)
        if deleted:
            self._remove_files(job.client, job.id)
        return deleted

    def video(self, job: Record) -> Path | None:
        """The video, or what is finished of it; None where that is nothing."""
        files = self.folder.output(job.client, job.id)
        return next((path for path in (files.video, files.partial) if path.is_file()), None)

    def ticket(self, job: Record) -> str:
        """What lets its bearer see the video of a job while this service runs, such as a player that sends no token."""
        return hmac.new(self._secret, job.id.encode(), hashlib.sha256).hexdigest()

    def view(self, job: Record) -> dict[str, Any]:
        """A job as its client sees it."""
        return {
            "id": job.id,
            "state": job.state,
            "priority": job.priority,
            "time_limit": job.time_limit,
            "created": job.created,
            "started": job.started,
            "ended": job.ended,
            "cancelling": job.cancelling,
            "ahead": self.queue.ahead(job) if job.state == "queued" else 0,
            "progress": vars(job.progress),
            "error": None if job.error is None else self.without_paths(job.error),
            "result": job.result,
            "request": job.request,
            "video": None if self.video(job) is None else f"/api/jobs/{job.id}/video?ticket={self.ticket(job)}",
        }

    def without_paths(self, sentence: str) -> str:
        """A sentence without the folders of this machine: uploads stay as their ids, models as their names."""
        clients = re.escape(str(self.folder.path / "clients"))
        sentence = re.sub(rf"{clients}[/\\][^/\\]+[/\\](uploads[/\\][a-z]+|jobs)[/\\]", "", sentence)
        for model in (*vars(self.base["files"]).values(), *(lora.path for lora in self.base.get("loras", ()))):
            if model is not None:
                sentence = sentence.replace(str(model), Path(model).name)
        return sentence

    def _checked(self, given: Mapping[str, Any], client: str) -> dict[str, Any]:
        """A job whose settings are of their types and whose files are uploads of its client."""
        settings = settings_of(given, FILES)
        spoken = settings.get("mode", self.base.get("mode")) != HUMO  # HuMo's videos may be silent
        if spoken and not given.get("audio"):
            raise InputError('"audio" is missing: give a list with the upload of each speaker\'s recording.')
        for name, kind in FILES.items():
            value = given.get(name)
            if value is None:
                continue
            ids = value if name in LISTS else [value]
            if not isinstance(ids, list) or len(ids) > 4:
                raise InputError(f"{name} {shown(value)} cannot be used: give a list of up to four uploads.")
            for id in ids:
                if not isinstance(id, str) or self._find(client, id, [kind]) is None:
                    raise InputError(
                        f"{name} {shown(id)} is no upload of yours of the kind {kind}: send the file first."
                    )
            settings[name] = value
        return settings

    def _find(self, client: str, id: str, kinds: Iterable[str]) -> Path | None:
        try:
            paths = [self.folder.upload(client, kind, id) for kind in kinds]
        except KeyError:
            return None
        return next((path for path in paths if path.is_file()), None)

    def by_ticket(self, id: str, ticket: str) -> Record | None:
        """The job of this id, where this is its ticket."""
        try:
            job = self.queue.get(id)
        except KeyError:
            return None
        return job if hmac.compare_digest(self.ticket(job).encode(), ticket.encode()) else None

    def _remove_files(self, client: str, id: str) -> None:
        shutil.rmtree(self.folder.output(client, id).video.parent, ignore_errors=True)


def _orders(given: dict[str, Any]) -> tuple[int, float | None]:
    """Take priority and time limit out of a job."""
    priority, limit = given.pop("priority", 0), given.pop("time_limit", None)
    if isinstance(priority, bool) or not isinstance(priority, int) or priority not in PRIORITIES:
        least, most = PRIORITIES[0], PRIORITIES[-1]
        raise InputError(f"priority {shown(priority)} cannot be used: give a whole number from {least} to {most}.")
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= LONGEST
    ):
        raise InputError(f"time_limit {shown(limit)} cannot be used: give seconds above 0 and up to {LONGEST:,.0f}.")
    return priority, limit
