"""The worker processes of a service: started, watched, and replaced when they die."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Protocol

import filelock
import torch

from ..pipeline.make_video import choose_device
from ..wanvideo.errors import InputError
from .folder import ServiceFolder
from .worker import examined, work

__all__ = ["GRACE", "LONGEST_PAUSE", "AnyWorkers", "Workers", "devices_of", "sole_service"]

logger = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds that a worker gets to end a job that is cancelled or late, before its process is ended."""

TICK = 0.1
"""Seconds between two looks at the workers."""

LONGEST_PAUSE = 30.0
"""Seconds before a worker is started again that has died again and again; the first time at once."""


def devices_of(name: str) -> list[str]:
    """The device of each worker: all GPUs for "auto", or the CPU where there is none; else the one that is named.

    Raises InputError for a device that is not there.
    """
    if name == "auto" and torch.cuda.device_count() > 0:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(choose_device(name))]


class AnyWorkers(Protocol):
    """What an API knows of those who make the jobs: how many there are to be, live, and have died and were replaced."""

    devices: Sequence[str]
    restarts: int

    @property
    def alive(self) -> int: ...

    def examine(self) -> dict[str, Any]:
        """The doctor's report of a worker's device."""


@contextmanager
def sole_service(folder: ServiceFolder) -> Iterator[None]:
    """Keep other services from using a folder. Raises InputError where one does."""
    with ExitStack() as context:
        try:
            context.enter_context(filelock.FileLock(folder.lock(), timeout=0))
        except filelock.Timeout:
            raise InputError(f"Another service uses {folder.path}: end it, or name another folder.") from None
        yield


class Workers:
    """A context in which the jobs of a folder's queue are made, by one process for each device.

    Args:
        base: the service's own settings, see `settings.build`.
        devices: of the workers, in the order of their slots.
        retries: how many workers may die while they run a job, before it fails.
        verbose: let them log more.

    Raises InputError on entry where another service uses the folder.
    """

    def __init__(
        self,
        folder: ServiceFolder,
        base: Mapping[str, Any],
        devices: Sequence[str],
        *,
        retries: int = 1,
        grace: float = GRACE,
        verbose: bool = False,
    ) -> None:
        self.folder, self.base, self.devices, self.grace, self.verbose = folder, base, devices, grace, verbose
        self.queue = folder.queue(retries)
        self.restarts = 0
        """Workers that have died and were replaced."""
        self._spawn = multiprocessing.get_context("spawn")  # a fork would share CUDA and the database
        self._slots = [_Slot() for _ in devices]
        self._asked: dict[str, float] = {}  # job -> when its end was first seen to be due
        self._ending = threading.Event()
        self._context = ExitStack()

    @property
    def alive(self) -> int:
        return sum(slot.process is not None and slot.process.is_alive() for slot in self._slots)

    def examine(self) -> dict[str, Any]:
        """The doctor's report of the first worker's device."""
        return examined(self.devices[0])

    def __enter__(self) -> Workers:
        with ExitStack() as context:
            context.enter_context(sole_service(self.folder))
            for job in self.queue.running():  # of a service that died: its workers end with it
                assert job.slot is not None
                with filelock.FileLock(self.folder.lock(job.slot)):
                    self.queue.release(job.slot, crashed=False)
            for number in range(len(self._slots)):
                self._start(number)
            watch = threading.Thread(target=self._watch, name="workers")
            watch.start()
            context.callback(watch.join)
            context.callback(self._ending.set)
            self._context = context.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()

    def _start(self, number: int) -> None:
        base = {**self.base, "device": self.devices[number]}
        process = self._spawn.Process(target=work, args=(self.folder, number, base, self.verbose), daemon=True)
        process.start()
        self._slots[number].process, self._slots[number].started = process, time.monotonic()

    def _watch(self) -> None:
        while not self._ending.wait(TICK):
            for number, slot in enumerate(self._slots):
                if slot.process is not None and not slot.process.is_alive():
                    self._bury(number, slot)
                if slot.process is None and time.monotonic() >= slot.again:
                    self._start(number)
            self._end_overdue()
        for number, slot in enumerate(self._slots):
            if slot.process is not None:
                slot.process.kill()
                slot.process.join()
                self.queue.release(number, crashed=False)

    def _bury(self, number: int, slot: _Slot) -> None:
        assert slot.process is not None
        job = self.queue.release(number, crashed=True)
        self.restarts += 1
        lived = time.monotonic() - slot.started
        slot.pause = 0.0 if lived > LONGEST_PAUSE else min(max(1.0, 2 * slot.pause), LONGEST_PAUSE)
        slot.again = time.monotonic() + (slot.pause if job is None else 0.0)
        logger.warning(
            "Worker %d ended with exit code %s%s; another one takes its place.",
            number,
            slot.process.exitcode,
            "" if job is None else f" while it made job {job.id}, which is {job.state} now",
        )
        slot.process = None

    def _end_overdue(self) -> None:
        """End the process of a worker that does not answer: it is stuck in one call."""
        due = {job.id: job for job in self.queue.running() if job.cancelling or job.late}
        now = time.monotonic()
        self._asked = {id: self._asked.get(id, now) for id in due}
        for id, since in self._asked.items():
            slot = due[id].slot
            if now - since > self.grace and slot is not None:
                process = self._slots[slot].process
                if process is not None:
                    process.kill()


class _Slot:
    """A worker: its process, when that was started, and when the next one may be."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None
        self.started = self.again = self.pause = 0.0
