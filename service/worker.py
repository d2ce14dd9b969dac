"""A process that makes the videos of the queue, one after the other, with models that stay loaded.

It holds the lock of its slot while it lives, and ends when the service does, however that ends. What a user can cause
ends the job; anything else ends the process, and the service starts another.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import filelock
import torch

from ..cli.doctor import examine
from ..cli.terminal import log_to_stderr
from ..media.video import OutputFiles, VideoFrames
from ..pipeline.loaded_models import LoadedModels
from ..pipeline.make_video import Events, Job, Result, choose_device, make_video
from ..wanvideo.errors import InfiniteTalkError, InputError
from .folder import ServiceFolder
from .queue import Progress, Queue, Record

__all__ = ["End", "Follower", "due", "examined", "made_before", "make", "make_reusing", "run", "work"]

logger = logging.getLogger(__name__)

IDLE = 0.2
"""Seconds between two looks at the queue, and at whether a job is to end."""


class Stopped(Exception):
    """The job is to end."""

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.end = end


def work(folder: ServiceFolder, slot: int, base: Mapping[str, Any], verbose: bool = False) -> None:
    """Make videos until the service ends; the target of a process.

    Args:
        slot: number of the worker.
        base: the service's own settings, see `settings.build`, with the device of this worker.
        verbose: log more.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends its workers
    log_to_stderr(verbose)
    with filelock.FileLock(folder.lock(slot)):
        device = torch.device(base["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        queue, loaded = folder.queue(), LoadedModels()
        while True:
            record = queue.claim(slot)
            if record is None:
                time.sleep(IDLE)
            else:
                run(queue, record, slot, folder, base, loaded)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def run(
    queue: Queue, record: Record, slot: int, folder: ServiceFolder, base: Mapping[str, Any], loaded: LoadedModels
) -> None:
    """Make the video of a job that this worker has claimed, and bring the job to its end.

    Where an earlier attempt has left finished windows, it goes on behind them; where it has left the video, nothing is
    made.
    """
    follower = Follower(partial(queue.report, record.id, slot), lambda: due(queue.get(record.id)))
    end = made_before(folder.output(record.client, record.id)) or make(record, folder, base, follower.events, loaded)
    queue.end(record.id, slot, end.state, error=end.error, result=end.result)


@dataclass(frozen=True)
class End:
    """How an attempt has ended: the state of the job, why it failed, and what was made."""

    state: str
    error: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


def due(record: Record) -> End | None:
    """How a running job is to end, as soon as its worker can; None: it goes on."""
    if record.cancelling:
        return End("cancelled")
    if record.late:
        return End("failed", f"The time limit of {record.time_limit:g} s was over.")
    return None


def made_before(files: OutputFiles) -> End | None:
    """The end of a job whose video is there: its worker died after the last step, and before it could say so."""
    if not files.video.exists():
        return None
    with files.locked():
        files.remove_unfinished()
    frames = VideoFrames(files.video)
    height, width = frames[0].shape[:2]
    return End("done", result={"frames": len(frames), "width": width, "height": height})


def make(
    record: Record,
    folder: ServiceFolder,
    base: Mapping[str, Any],
    events: Events,
    loaded: LoadedModels,
    anew: Callable[[], None] = lambda: None,
) -> End:
    """Make the video of a job in `folder`, behind the windows that are there.

    Args:
        anew: called where those are of other settings, and replaced.
    """
    try:
        made = _made(folder.job(record, base), events, loaded, anew)
    except Stopped as stopped:
        return stopped.end
    except InfiniteTalkError as error:
        logger.warning("Job %s failed: %s", record.id, error)
        return End("failed", str(error))
    result = {
        "frames": made.frames,
        "width": made.width,
        "height": made.height,
        "seconds": round(made.seconds, 3),
        "kernels": dict(made.kernels),
        "linears": dict(made.linears),
        "reused": loaded.reused,
    }
    return End("done", result=result)


def _made(job: Job, events: Events, loaded: LoadedModels, anew: Callable[[], None]) -> Result:
    """The video of a job, behind the windows that are there; all of it where those are of other settings.

    The service may have been started with other models since.
    """
    try:
        return make_reusing(replace(job, resume=True), events, loaded)
    except InputError as error:
        if not OutputFiles.of(job.out).journal.exists():
            raise
        logger.info("Beginning anew: %s", error)
    anew()
    return make_reusing(job, events, loaded)


def make_reusing(job: Job, events: Events, loaded: LoadedModels) -> Result:
    """`make_video`, and where it fails beside models of other jobs, once more without: memory may suffice for it alone.

    Raises what `make_video` raises.
    """
    try:
        return make_video(job, events, loaded)
    except InfiniteTalkError as error:
        # Its kinds say what is wrong with inputs, files or the machine, and stays wrong.
        if type(error) is not InfiniteTalkError or not loaded.reused:
            raise
        loaded.clear()
        logger.info("Once more, with nothing loaded before: %s", error)
    return make_video(replace(job, resume=True), events, loaded)


class Follower:
    """`events` of a job, which report how far it is, and raise Stopped when it is to end.

    Args:
        report: called with what has changed.
        due: how the job is to end; None: it goes on.
        keep: called when windows are finished.
    """

    def __init__(
        self,
        report: Callable[[Progress], None],
        due: Callable[[], End | None],
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        self.report, self.due, self.keep = report, due, keep
        self.progress = Progress()
        self._told: tuple[float, Progress] = (0.0, self.progress)
        self.events = Events(
            stage=lambda text: self._note(stage=text),
            reading=lambda done, total: self._note(),
            part=lambda text, done, total: self._note(),
            step=lambda window, windows, step, steps: self._note(windows=windows, step=step, steps=steps),
            window_done=self._window_done,
            check_interrupt=self._note,
        )

    def _window_done(self, done: int, windows: int) -> None:
        self.keep()
        self._note(windows_done=done, windows=windows)

    def _note(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)
        when, told = self._told
        milestone = (self.progress.stage, self.progress.windows_done) != (told.stage, told.windows_done)
        if not milestone and time.monotonic() - when < IDLE:
            return
        self._told = (time.monotonic(), self.progress)
        if self.progress != told:
            self.report(self.progress)
        if (end := self.due()) is not None:
            raise Stopped(end)


def examined(device: str) -> dict[str, Any]:
    """The doctor's report of a device, from a process of its own, whose GPU memory is free again afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_report, device).result()


def _report(device: str) -> dict[str, Any]:
    report: dict[str, Any] = examine(choose_device(device)).as_json()
    return report
