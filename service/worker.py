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
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import filelock
import torch

from ..cli.terminal import log_to_stderr
from ..media.video import OutputFiles, VideoFrames
from ..pipeline.loaded_models import LoadedModels
from ..pipeline.make_video import Events, Job, Result, make_video
from ..wanvideo.errors import InfiniteTalkError, InputError
from .folder import ServiceFolder
from .queue import Progress, Queue, Record

__all__ = ["make_reusing", "run", "work"]

logger = logging.getLogger(__name__)

IDLE = 0.2
"""Seconds between two looks at the queue, and at whether a job is to end."""


class Stopped(Exception):
    """The job is to end: its state, and why."""

    def __init__(self, state: str, error: str | None = None) -> None:
        super().__init__(state, error)
        self.state, self.error = state, error


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
    files = folder.output(record.client, record.id)
    if files.video.exists():  # its worker died after the last step, and before it could say so
        with files.locked():
            files.remove_unfinished()
        frames = VideoFrames(files.video)
        height, width = frames[0].shape[:2]
        queue.end(record.id, slot, "done", result={"frames": len(frames), "width": width, "height": height})
        return
    try:
        made = _made(folder.job(record, base), Follower(queue, record, slot).events, loaded)
    except Stopped as stopped:
        queue.end(record.id, slot, stopped.state, error=stopped.error)
    except InfiniteTalkError as error:
        logger.warning("Job %s failed: %s", record.id, error)
        queue.end(record.id, slot, "failed", error=str(error))
    else:
        result = {
            "frames": made.frames,
            "width": made.width,
            "height": made.height,
            "seconds": round(made.seconds, 3),
            "kernels": dict(made.kernels),
            "linears": dict(made.linears),
            "reused": loaded.reused,
        }
        queue.end(record.id, slot, "done", result=result)


def _made(job: Job, events: Events, loaded: LoadedModels) -> Result:
    """The video of a job, behind the windows that are there; all of it where those are of other settings.

    The service may have been started with other models since.
    """
    try:
        return make_reusing(replace(job, resume=True), events, loaded)
    except InputError as error:
        if not OutputFiles.of(job.out).journal.exists():
            raise
        logger.info("Beginning anew: %s", error)
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
    """`events` of a job, which tell the queue how far it is, and raise Stopped when it is to end."""

    def __init__(self, queue: Queue, record: Record, slot: int) -> None:
        self.queue, self.record, self.slot = queue, record, slot
        self.progress = Progress()
        self._told: tuple[float, Progress] = (0.0, self.progress)
        self.events = Events(
            stage=lambda text: self._note(stage=text),
            reading=lambda done, total: self._note(),
            part=lambda text, done, total: self._note(),
            step=lambda window, windows, step, steps: self._note(windows=windows, step=step, steps=steps),
            window_done=lambda done, windows: self._note(windows_done=done, windows=windows),
            check_interrupt=self._note,
        )

    def _note(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)
        when, told = self._told
        milestone = (self.progress.stage, self.progress.windows_done) != (told.stage, told.windows_done)
        if not milestone and time.monotonic() - when < IDLE:
            return
        self._told = (time.monotonic(), self.progress)
        if self.progress != told:
            self.queue.report(self.record.id, self.slot, self.progress)
        now = self.queue.get(self.record.id)
        if now.cancelling:
            raise Stopped("cancelled")
        if now.late:
            raise Stopped("failed", f"The time limit of {now.time_limit:g} s was over.")
