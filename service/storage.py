"""What the service and workers on other machines hand to each other: files in a storage that all of them reach.

    ID/STARTED/inputs/KIND/ID       uploads that the job names                            from the service
    ID/STARTED/given.mp4, .journal  windows of the attempts before                        from the service
    ID/STARTED/OFFSET.part          bytes of the partial file, from this one on           from the worker
    ID/STARTED/BYTES.journal        the journal for so many bytes of it                   from the worker
    ID/STARTED/video.mp4            the video                                             from the worker

Each attempt has a folder of its own: a worker that was given up, and still computes, disturbs no other. A file gets its
name when it is whole, a journal comes after the parts that it speaks of, and goes after the next one is there: at any
moment the last journal has all its parts. Parts keep what is sent linear in the length of the video, and need no file
system that can append.

All is taken into the service's own folder while the job runs, and the job's folder here goes when the attempt ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec

from ..media.video import OutputFiles, replace_file
from ..pipeline.journal import finished_windows, written_of
from ..pipeline.loaded_models import LoadedModels
from ..wanvideo.errors import InputError
from .folder import FILES, ServiceFolder, new_id
from .queue import Progress, Record
from .worker import End, Follower, make

__all__ = ["Attempt", "Storage", "StorageError", "make_elsewhere"]

logger = logging.getLogger(__name__)


class StorageError(Exception):
    """A storage that does not do what it is asked for, at this moment."""


class Storage:
    """A folder of any file system that fsspec knows. Its methods raise StorageError.

    Args:
        url: a path, or an address such as s3://bucket/folder.

    Raises InputError for an address that no installed file system takes.
    """

    def __init__(self, url: str) -> None:
        self.url = url if "://" in url else str(Path(url).expanduser().absolute())
        try:
            self.files, self.root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(
                f"The storage {url} cannot be used ({error}): give a folder, or another address."
            ) from error

    @contextlib.contextmanager
    def marked(self) -> Iterator[str]:
        """Put a file there, as long as the context lasts, by whose name others find out whether theirs is the same.

        Raises InputError for a storage that cannot be written to.
        """
        name = f"{new_id()}.service"
        try:
            self.put(name, b"")
        except StorageError as error:
            raise InputError(f"{error} Give another folder or address.") from error
        try:
            yield name
        finally:
            with contextlib.suppress(StorageError):
                self.remove(name)

    def attempt(self, record: Record) -> Attempt:
        """The files of the attempt that a running job has begun."""
        assert record.started is not None
        return Attempt(self, record.id, f"{record.id}/{record.started:.6f}")

    def names(self, folder: str = "") -> list[str]:
        """Of the files in a folder, in order; none where there is no folder."""
        with self._explained():
            self.files.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return sorted(Path(path).name for path in self.files.ls(self._path(folder), detail=False))
        return []

    def read(self, name: str) -> bytes:
        with self._explained():
            data: bytes = self.files.cat_file(self._path(name))
        return data

    def put(self, name: str, data: bytes) -> None:
        """Write a file that gets its name when it is whole."""
        path = self._path(name)
        with self._explained():
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(f"{path}.tmp", data)
            self.files.mv(f"{path}.tmp", path)

    def upload(self, path: Path, name: str) -> None:
        with self._explained():
            self.files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        with self._explained():
            self.files.get_file(self._path(name), str(path))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it, where there is one."""
        with self._explained(), contextlib.suppress(FileNotFoundError):
            self.files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the library of a file system raises
            raise StorageError(f"The storage {self.url} failed ({type(error).__name__}: {error}).") from error


class Attempt:
    """The files of one attempt at a job. Its methods raise StorageError, and OSError of files on this machine."""

    def __init__(self, storage: Storage, id: str, folder: str) -> None:
        self.storage, self.id, self.folder = storage, id, folder
        self._sent = 0  # bytes of the partial file that the service has been sent, or has sent
        self._journal: str | None = None
        self._taken: int | None = None

    # --- the service

    def give(self, folder: ServiceFolder, record: Record) -> None:
        """Hand out what the worker needs: uploads, and windows that are finished."""
        for field, paths in folder.inputs(record.client, record.request).items():
            for path in paths:
                if path.is_file():  # else the worker says what is missing
                    self.storage.upload(path, f"{self.folder}/inputs/{FILES[field]}/{path.name}")
        output = folder.output(record.client, record.id)
        if finished_windows(output):
            self.storage.upload(output.partial, f"{self.folder}/given.mp4")
            self.storage.upload(output.journal, f"{self.folder}/given.journal")

    def take(self, output: OutputFiles) -> None:
        """Bring what the worker has finished by now to the service's own files.

        Whatever dies meanwhile, a job can go on with these, or with what the next call makes of them.
        """
        names = self.storage.names(self.folder)
        journals = [name for name in names if name.endswith(".journal") and name != GIVEN]
        if not journals:
            return
        output.video.parent.mkdir(parents=True, exist_ok=True)
        journal = self.storage.read(f"{self.folder}/{journals[-1]}")
        size = _bytes(journals[-1])
        parts = {_bytes(name): name for name in names if name.endswith(".part")}
        if self._taken is None:
            self._taken = min(parts)  # 0 where the worker has begun anew
        for begin, name in parts.items():
            if self._taken <= begin < size:
                output.add(begin, self.storage.read(f"{self.folder}/{name}"))
        self._taken = size
        replace_file(output.journal, output.temporary, journal)

    def take_video(self, output: OutputFiles) -> None:
        """Put the video in its place."""
        try:
            self.storage.download(f"{self.folder}/video.mp4", output.temporary)
            with output.temporary.open("rb+") as file:
                os.fsync(file.fileno())
            output.put_in_place()
        finally:
            output.temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all that is in the storage of the job."""
        self.storage.remove(self.id)

    # --- the worker

    def fetch(self, folder: ServiceFolder, record: Record) -> None:
        """Put what the service has handed out into a folder like its own."""
        for field, paths in folder.inputs(record.client, record.request).items():
            there = self.storage.names(f"{self.folder}/inputs/{FILES[field]}")
            for path in paths:
                if path.name in there:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self.storage.download(f"{self.folder}/inputs/{FILES[field]}/{path.name}", path)
                    os.utime(path, (0, 0))  # a journal knows large files by their time: here it says nothing
        output = folder.output(record.client, record.id)
        output.video.parent.mkdir(parents=True)
        if GIVEN in self.storage.names(self.folder):
            self.storage.download(f"{self.folder}/given.mp4", output.partial)
            self.storage.download(f"{self.folder}/{GIVEN}", output.journal)
            self._sent = written_of(output.journal.read_bytes()).bytes

    def send(self, output: OutputFiles) -> None:
        """Hand over the windows that are new in the worker's files, which another thread may be writing to.

        Where it fails, the next call hands over what this one has not.
        """
        journal = output.journal.read_bytes()  # first: the partial file has all that it speaks of, and maybe more
        size = written_of(journal).bytes
        if size <= self._sent:
            return
        with output.partial.open("rb") as file:
            file.seek(self._sent)
            part = file.read(size - self._sent)
        self.storage.put(f"{self.folder}/{self._sent:015d}.part", part)
        name = f"{self.folder}/{size:015d}.journal"
        self.storage.put(name, journal)
        before, self._sent, self._journal = self._journal, size, name
        if before is not None:
            self.storage.remove(before)

    def anew(self) -> None:
        """The windows that were handed out are of other settings: the next ones to hand over are the first."""
        self._sent = 0

    def send_video(self, output: OutputFiles) -> None:
        self.storage.upload(output.video, f"{self.folder}/video.mp4")


GIVEN = "given.journal"


def _bytes(name: str) -> int:
    """The number in the name of a part or a journal."""
    return int(name.partition(".")[0])


def make_elsewhere(
    record: Record,
    attempt: Attempt,
    base: Mapping[str, Any],
    report: Callable[[Progress], None],
    due: Callable[[], End | None],
    loaded: LoadedModels,
    home: str,
) -> End:
    """Make the video of a job, of what the service has handed out, and hand over what is finished.

    Args:
        base: the service's own settings, with whole paths.
        report, due: see `Follower`.
        home: the folder of the service, which is named in sentences in the place of one of this machine.

    Raises StorageError where nothing can be had, or the video not be handed over.
    """
    if missing := _missing(base):
        return End(
            "failed",
            f"The machine {socket.gethostname()} lacks {', '.join(missing)}: model files need the same paths on all "
            "machines.",
        )
    with tempfile.TemporaryDirectory(prefix="infinitetalk-") as temporary:
        folder = ServiceFolder.make(temporary)
        output = folder.output(record.client, record.id)
        attempt.fetch(folder, record)

        def keep() -> None:
            try:
                attempt.send(output)
            except StorageError as error:
                logger.warning("%s It is tried again after the next window.", error)

        follower = Follower(report, due, keep)
        end = make(record, folder, base, follower.events, loaded, attempt.anew)
        if end.state == "done":
            attempt.send_video(output)
        elif output.journal.exists():
            keep()  # a window that was written while the job ended
        return end if end.error is None else replace(end, error=end.error.replace(str(folder.path), home))


def _missing(base: Mapping[str, Any]) -> list[str]:
    """Model files that are not there; those with whole paths were on the service's machine."""
    paths = [*vars(base["files"]).values(), *(lora.path for lora in base.get("loras", ()))]
    return [str(path) for path in paths if path and Path(path).is_absolute() and not Path(path).exists()]
