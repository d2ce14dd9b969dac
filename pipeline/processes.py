"""Processes that compute one video together, one for each GPU, and the process that watches them.

All of them run the same work with the same argument (`wanvideo.runtime.parallel` says what they divide). The first one
writes and answers. The caller's process takes no part: whatever becomes of the others, a process that dies, hangs or
runs out of memory, it ends them all within a time limit and says what happened, in one sentence.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..wanvideo.errors import InfiniteTalkError
from ..wanvideo.runtime.parallel import Mesh, make_mesh

__all__ = ["GRACE", "TIME_LIMIT", "Processes", "StopAsked", "Work"]

logger = logging.getLogger(__name__)

TIME_LIMIT = 600.0
"""Seconds without a word from any process, after which they are ended: none of their steps takes as long."""

GRACE = 15.0
"""Seconds that the first process gets to put what is finished on the disk, when they are to end."""

DEATH = 10.0
"""Seconds that a process may take to die, counted from when its connections to the others are cut."""

TICK = 0.1
"""Seconds between two looks at whether the caller asks for an end."""

PACKAGE = __package__.partition(".")[0]

Work = Callable[["Seat", Any], Any]
"""What each process does with an argument; what the first one returns is the answer. Found by its name."""


class StopAsked(BaseException):
    """In a process: the caller asks for an end. Not an error, and for nobody to catch but the process itself."""


class Seat:
    """A process's place: what `Work` is given.

    Attributes:
        mesh: how it shares in the work.
        device: its own.
        memory: what it keeps from one call to the next.
    """

    def __init__(self, mesh: Mesh, device: torch.device, connection: Connection) -> None:
        self.mesh, self.device, self.memory = mesh, device, dict[str, Any]()
        self._connection = connection
        self._lock = threading.Lock()  # log lines come from threads, too
        self._said = 0.0

    def send(self, kind: str, value: Any = None) -> None:
        with self._lock:
            self._connection.send((kind, value))
            self._said = time.monotonic()

    def alive(self) -> None:
        """Say that this process goes on, at most once a second, and see whether it is to end.

        Raises StopAsked.
        """
        if self._connection.poll():
            raise StopAsked
        if time.monotonic() - self._said > 1:
            self.send("alive")

    def receive(self) -> Any:
        return self._connection.recv()


class Processes:
    """A process for each device, from the first `call` to `close`, or to the first failure.

    Args:
        devices: of the processes; equal ones on a CPU.
        passes: how many divide the passes of a step; the rest divide tokens.
        work: what a call has them do.
        time_limit: seconds without a word, see `TIME_LIMIT`.
    """

    def __init__(
        self, devices: Sequence[torch.device], passes: int, work: Work, time_limit: float = TIME_LIMIT
    ) -> None:
        self.devices, self.passes, self.work, self.time_limit = tuple(devices), passes, work, time_limit
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def call(
        self,
        argument: Any,
        follow: Callable[[str, Any], None] = lambda kind, value: None,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> Any:
        """The first process's answer.

        Args:
            follow: called with each (kind, value) that the first process sends.
            check_interrupt: called ten times a second; what it raises ends the processes, and is raised here.

        Raises:
            InfiniteTalkError: what a process raised, or became of it.
        """
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                connection.send(argument)
            return self._follow(follow, check_interrupt)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes; the first one may write what is finished before."""
        for process in self._processes[1:]:
            process.kill()
        if self._processes:
            with contextlib.suppress(OSError):
                self._connections[0].send(None)
            self._drain(self._processes[0], self._connections[0])
            self._processes[0].kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA
        self._folder = tempfile.TemporaryDirectory(prefix="infinitetalk-")  # where they find each other
        level = logging.getLogger(PACKAGE).getEffectiveLevel()
        for rank, device in enumerate(self.devices):
            ours, theirs = context.Pipe()
            place = (rank, len(self.devices), device, self.passes, Path(self._folder.name), 2 * self.time_limit, level)
            name = f"GPU process {rank}"
            process = context.Process(target=_process, args=(theirs, self.work, *place), name=name, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _follow(self, follow: Callable[[str, Any], None], check_interrupt: Callable[[], None]) -> Any:
        answers: dict[int, Any] = {}
        said = [time.monotonic()] * len(self._processes)
        while len(answers) < len(self._processes):
            check_interrupt()
            for connection in wait([c for n, c in enumerate(self._connections) if n not in answers], TICK):
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                said[rank] = time.monotonic()
                try:
                    kind, value = self._connections[rank].recv()
                except (EOFError, OSError):
                    raise self._death(rank) from None
                if kind == "failed":
                    raise self._failure(rank, value)
                if kind == "log":
                    logging.getLogger(value.name).handle(value)
                elif kind == "done":
                    answers[rank] = value
                elif kind != "alive":
                    follow(kind, value)
            late = time.monotonic() - self.time_limit
            silent = [self._name(n) for n in range(len(said)) if n not in answers and said[n] < late]
            if silent:
                raise InfiniteTalkError(
                    f"Nothing has come from {' and '.join(silent)} for {self.time_limit:g} s: all processes were ended."
                )
        return answers[0]

    def _failure(self, rank: int, error: Exception | str) -> Exception:
        """What a process raised; where another one has died, the failure is of that."""
        if not isinstance(error, InfiniteTalkError):
            # A death cuts the connections of the others at once, which may be known before it.
            dead = wait([process.sentinel for process in self._processes], DEATH)
            for number, process in enumerate(self._processes):
                if process.sentinel in dead:
                    return self._death(number)
            return RuntimeError(f"The process of {self._name(rank)} failed:\n{error}")
        if rank:
            error.args = (f"On {self._name(rank)}: {error}",)
        return error

    def _death(self, rank: int) -> InfiniteTalkError:
        process = self._processes[rank]
        process.join(GRACE)
        code = process.exitcode
        how = (
            f"was killed ({signal.Signals(-code).name})" if code is not None and code < 0 else f"ended with code {code}"
        )
        return InfiniteTalkError(f"The process of {self._name(rank)} {how}, and the others were ended.")

    def _name(self, rank: int) -> str:
        device = self.devices[rank]
        return f"GPU {device.index}" if device.type == "cuda" else f"{device} number {rank}"

    @staticmethod
    def _drain(process: BaseProcess, connection: Connection) -> None:
        """Wait for the end of a process, for `GRACE` seconds, reading what it still sends, so that it can go on."""
        end = time.monotonic() + GRACE
        while process.is_alive() and time.monotonic() < end:
            with contextlib.suppress(EOFError, OSError):
                if connection.poll(TICK):
                    connection.recv()
            process.join(0)


# ------------------------------------------------------------------------------------------------------- in a process


def _process(
    connection: Connection,
    work: Work,
    rank: int,
    size: int,
    device: torch.device,
    passes: int,
    folder: Path,
    timeout: float,
    level: int,
) -> None:
    """The life of one of the processes: the same work with each argument that comes, until None or a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seat = Seat(Mesh(), device, connection)
    package = logging.getLogger(PACKAGE)
    package.handlers = [_Sender(seat)] if rank == 0 else [logging.NullHandler()]
    package.propagate = False
    package.setLevel(level)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        seat.mesh = make_mesh(device.type, passes)
        while (argument := seat.receive()) is not None:
            seat.send("done", work(seat, argument))
    except (StopAsked, EOFError):
        pass
    except InfiniteTalkError as error:
        seat.send("failed", error)
        seat.receive()
    except RuntimeError:  # torch's, of an exchange whose other end is gone; anything else ends the process loudly
        seat.send("failed", traceback.format_exc())
        seat.receive()
    os._exit(0)  # what waits in a collective would wait at the end of Python, too


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Sender(logging.Handler):
    """Log lines of a process, for the handlers of the caller's."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self.seat = seat

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info, record.exc_text = record.getMessage(), None, None, None
        with contextlib.suppress(OSError):
            self.seat.send("log", record)
