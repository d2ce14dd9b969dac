"""Finished windows on their way into the video file, while the next ones are computed.

    with VideoWriter(...) as writer, Recorder(writer, journal, kernels, announce) as recorder:
        for window in generate(..., Callbacks(check_interrupt=recorder.check), frames_dtype=torch.uint8):
            recorder.add(window)

Encoding a window takes a video encoder seconds, in which the GPU would wait. It is done by one thread, in order; few
windows wait for it, so that memory stays flat. A window is announced, in the thread of the caller, after its frames
and its journal entry are on the disk.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

from torch import Tensor

from ..media.video import VideoWriter
from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.runtime.host import to_host
from .journal import Journal
from .long_video import FinishedWindow, RunState

__all__ = ["WAITING", "Discarder", "Recorder"]

logger = logging.getLogger(__name__)

WAITING = 1
"""Windows that may wait while another one is written."""


class Recorder:
    """Writes windows and their journal entries. Leaving its context waits for all that were added.

    Args:
        kernels: names of attention kernels, as counted so far.
        announce: called with (windows in the file, windows in all) for each of them, in order, by the methods here.
    """

    def __init__(
        self,
        writer: VideoWriter,
        journal: Journal,
        kernels: Collection[str],
        announce: Callable[[int, int], None] = lambda done, windows: None,
    ) -> None:
        self.writer, self.journal, self.kernels, self.announce = writer, journal, kernels, announce
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._pending: deque[tuple[Future[None], int, int]] = deque()  # with the window's number and their count
        self._failed: Exception | None = None

    def add(self, window: FinishedWindow) -> None:
        """Have a window written; waits while `WAITING` windows do. Raises what `check` raises."""
        self.check()
        while len(self._pending) > WAITING:
            self._finish_first()
        state = replace(window.state, carried=to_host(window.state.carried), latents=to_host(window.state.latents))
        written = self._thread.submit(self._write, window.frames, state, tuple(self.kernels))
        self._pending.append((written, window.index + 1, window.count))

    def check(self) -> None:
        """Announce the windows that are in the file by now.

        Raises InfiniteTalkError when the file could not be written. Whatever follows is not written either.
        """
        while self._pending and self._pending[0][0].done():
            self._finish_first()

    def finish(self) -> None:
        """Wait for all that were added. Raises what `check` raises."""
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        written, number, count = self._pending[0]
        written.result()
        self._pending.popleft()
        self.announce(number, count)

    def _write(self, frames: Tensor, state: RunState, kernels: Collection[str]) -> None:
        if self._failed is not None:  # a window that is missing is followed by none
            raise self._failed
        try:
            written = self.writer.append(frames)
            with self.writer.explained():
                self.journal.save(state, written, kernels)
        except Exception as error:
            self._failed = error
            raise

    def __enter__(self) -> Recorder:
        # The thread is started here: an interruption while it starts would leave it unknown to `shutdown`, and with a
        # window in it.
        self._thread.submit(bool).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except InfiniteTalkError as failure:
            if error is None:
                raise
            if failure is not error:  # the first one is told to the caller
                logger.warning("%s", failure)
        finally:
            self._thread.shutdown()


class Discarder:
    """In place of a `Recorder` where another process writes the windows."""

    def add(self, window: FinishedWindow) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""

    def __enter__(self) -> Discarder:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing."""
