"""The workers of a service on the machines of a Ray cluster.

Ray places each worker where the GPUs that it asks for are free, finds out when it dies, and places another one. The
service keeps the queue: a thread for each worker claims a job, hands it to the worker through the storage, and brings
what is finished to the service's own folder after each window. There it lies as that of a worker on the own machine
would, so that whatever dies, the job goes on elsewhere.

A job is claimed for a worker that lives. Where the worker's process dies, the job may be the reason, which counts;
where Ray says that its node has died, or the worker was out of reach for a moment, it does not, for the first `NODES`
times.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from .. import __version__
from ..cli.terminal import log_to_stderr
from ..media.video import OutputFiles
from ..pipeline.loaded_models import LoadedModels
from ..pipeline.make_video import ModelFiles, choose_device
from ..wanvideo.errors import InfiniteTalkError, InputError
from .folder import ServiceFolder
from .queue import Progress, Record
from .storage import Attempt, Storage, StorageError, make_elsewhere
from .worker import IDLE, End, due, examined, made_before
from .workers import GRACE, LONGEST_PAUSE, sole_service

__all__ = ["ClusterWorker", "ClusterWorkers", "absolute", "connect"]

logger = logging.getLogger(__name__)

NODES = 3
"""Nodes that may die while they run a job, before one more counts as a death by the job, which may take all memory."""

PATIENCE = 10.0
"""Seconds in which a worker, and the head of the cluster, answer."""

VERDICT = 60.0
"""Seconds in which Ray finds out what has become of a worker that does not answer: it asks nodes every few seconds."""

ADDRESS = re.compile(r"(?:(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})|auto)")


def connect(address: str) -> None:
    """Join a Ray cluster.

    Args:
        address: HOST:PORT of its head, or "auto" on a machine that belongs to it.

    Raises InputError where none answers there, or one of another version of Ray or Python.
    """
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise InputError(
            f"{address} is no address of a Ray cluster: give HOST:PORT of its head, such as 10.0.0.1:6379."
        )
    try:
        if found["host"]:  # Ray itself would try for two minutes
            socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=PATIENCE).close()
        ray.init(address, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError, RayError, SystemExit) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().rstrip(".")
        raise InputError(f"The Ray cluster at {address} cannot be joined ({reason}): check the address.") from error


def absolute(base: Mapping[str, Any]) -> dict[str, Any]:
    """The service's own settings with whole paths of files, as processes with other working folders need them."""

    def whole(path: Any) -> Any:
        place = None if path is None else Path(path).expanduser()
        return path if place is None or not place.exists() else place.absolute()  # maybe a name of the hub

    files = {entry.name: whole(getattr(base["files"], entry.name)) for entry in fields(ModelFiles)}
    loras = tuple(replace(lora, path=whole(lora.path)) for lora in base.get("loras", ()))
    return {**base, "files": ModelFiles(**files), "loras": loras}


def versions() -> dict[str, str]:
    """What must be the same wherever a video is made, for another machine to go on with it."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "av")}
    return {"python": platform.python_version(), "wanvideo-infinitetalk": __version__, **packages}


# --- on other machines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a worker is: machine, process, Ray's id of the node, versions, and why it cannot be used, if so."""

    host: str
    process: int
    node: str
    versions: Mapping[str, str]
    lacks: str | None


class ClusterWorker:
    """An actor that makes videos, one after the other, with models that stay loaded.

    Args:
        storage: as `Storage` takes it.
        base: the service's own settings, see `settings.build`.
        verbose: log more.
    """

    def __init__(self, storage: str, base: Mapping[str, Any], verbose: bool = False) -> None:
        log_to_stderr(verbose)
        self.storage, self.base = storage, base
        self.loaded = LoadedModels()
        self._progress = Progress()
        self._end: End | None = None

    def place(self, mark: str) -> Place:
        """Where this is. `mark`: a file in the storage, see `Storage.marked`."""
        lacks: str | None = None
        try:
            choose_device(self.base["device"])
            if mark not in Storage(self.storage).names():
                lacks = f"The storage {self.storage} is not the service's there: all machines need to reach the same."
        except (InfiniteTalkError, StorageError) as error:
            lacks = str(error)
        return Place(socket.gethostname(), os.getpid(), ray.get_runtime_context().get_node_id(), versions(), lacks)

    def live(self) -> None:
        """Returns never: who waits for it waits for the end of this actor."""
        threading.Event().wait()

    def examine(self) -> dict[str, Any]:
        """The doctor's report."""
        return examined(self.base["device"])

    def follow(self, end: End | None) -> Progress:
        """How far the job is. `end`: how it is to end; None: it goes on."""
        self._end = end
        return self._progress

    def make(self, record: Record, home: str) -> End:
        """Make the video of a job; `home`: see `make_elsewhere`."""
        self._progress, self._end = Progress(), None

        def report(progress: Progress) -> None:
            self._progress = progress

        attempt = Storage(self.storage).attempt(record)
        return make_elsewhere(record, attempt, self.base, report, lambda: self._end, self.loaded, home)


# --- the service -----------------------------------------------------------------------------------------------------


class _Ending(Exception):
    """The service ends."""


class ClusterWorkers:
    """A context in which the jobs of a folder's queue are made on a Ray cluster. The interface is that of `Workers`.

    Args:
        base: the service's own settings, see `settings.build`.
        address: see `connect`.
        storage: a folder or an address that all machines reach; None: `storage` in the service's folder.
        count: workers; None: as many as the cluster has GPUs for, and without GPUs one for each node.
        device: of the workers; "auto" is "cuda" where they ask for a GPU.
        gpus: GPUs that each asks for, from 0 to 1: a part of one is shared. None: one, and none for the device "cpu".
        retries: how many workers may die while they run a job, before it fails.
        verbose: let them log more.

    Raises InputError on entry where the cluster or the storage cannot be reached, no worker would find a place, or
    another service uses the folder.
    """

    def __init__(
        self,
        folder: ServiceFolder,
        base: Mapping[str, Any],
        address: str,
        *,
        storage: str | None = None,
        count: int | None = None,
        device: str = "auto",
        gpus: float | None = None,
        retries: int = 1,
        grace: float = GRACE,
        verbose: bool = False,
    ) -> None:
        if device not in ("auto", "cuda", "cpu"):
            raise InputError(f"Device '{device}' is one of a single machine: on a cluster choose auto, cuda or cpu.")
        self.gpus = (0.0 if device == "cpu" else 1.0) if gpus is None else gpus
        if not 0 <= self.gpus <= 1 or (device == "cuda" and not self.gpus):
            raise InputError(
                f"A worker cannot ask for {self.gpus:g} GPUs: it computes on one, a part of one, or the CPU."
            )
        if count is not None and count < 1:
            raise InputError(f"{count} workers make no video: give 1 or more.")
        if device == "auto":
            device = "cuda" if self.gpus else "cpu"
        self.folder, self.address, self.count, self.grace, self.verbose = folder, address, count, grace, verbose
        self.base = {**absolute(base), "device": device}
        self.storage = Storage(storage or str(folder.path / "storage"))
        self.queue = folder.queue(retries)
        self.devices: Sequence[str] = ()
        """Of each worker, those that wait for a place included; known inside of the context."""
        self.restarts = 0
        """Workers that have died and were replaced."""
        self._living: dict[int, Any] = {}  # number -> actor
        self._nodes_lost: Counter[str] = Counter()  # job -> nodes that died while they ran it
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._context = ExitStack()

    @property
    def alive(self) -> int:
        return len(self._living)

    def examine(self) -> dict[str, Any]:
        """The doctor's report of a worker that lives. Raises InfiniteTalkError while there is none."""
        for worker in list(self._living.values()):
            with suppress(RayError):
                report: dict[str, Any] = ray.get(worker.examine.remote())
                return report
        raise InfiniteTalkError("No worker lives at this moment: ask again when /health says that one does.")

    def __enter__(self) -> ClusterWorkers:
        with ExitStack() as context:
            context.enter_context(sole_service(self.folder))
            mark = context.enter_context(self.storage.marked())
            connect(self.address)
            context.callback(ray.shutdown)
            ray.put(None)  # sets up how Ray sends values, which several threads cannot do at once
            count = self._fitting() if self.count is None else self.count
            self.devices = [self.base["device"]] * count
            for job in self.queue.running():  # of a service that died: Ray ends its workers, which disturb nothing
                assert job.slot is not None
                with filelock.FileLock(self.folder.lock(job.slot)):  # of a worker on this machine, if it was one
                    self._take_all(job)
                    self.queue.release(job.slot, crashed=False)
            threads = [threading.Thread(target=self._run, args=(n, mark), name=f"worker {n}") for n in range(count)]
            for thread in threads:
                thread.start()
                context.callback(thread.join)
            context.callback(self._ending.set)
            self._context = context.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()

    def _fitting(self) -> int:
        """Workers for which the cluster has room."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not self.gpus:
            return len(nodes)
        count = sum(int(node.get("GPU", 0) / self.gpus) for node in nodes)
        if not count:
            raise InputError(
                f"No node of the Ray cluster at {self.address} has GPUs: start one that has, give --device cpu, or "
                "--workers N to wait for them."
            )
        return count

    # --- a worker and its thread

    def _run(self, number: int, mark: str) -> None:
        """Keep a worker in the cluster, and give it jobs, until the service ends."""
        kind = ray.remote(ClusterWorker).options(num_cpus=1, num_gpus=self.gpus, max_concurrency=4)
        pause = 0.0
        while not self._ending.wait(pause):
            began, job, worker = time.monotonic(), None, None
            try:
                worker = kind.remote(self.storage.url, self.base, self.verbose)
                place = self._placed(worker.place.remote(mark), number)
                logger.info("Worker %d is process %d on %s.", number, place.process, place.host)
                gone = worker.live.remote()
                self._living[number] = worker
                while True:
                    job = self._next(number, gone)
                    self._make(job, number, worker, place)
                    job = None
            except _Ending:
                return
            except (InputError, StorageError, RayError) as error:
                logger.warning("Worker %d is given up: %s", number, error)
            except Exception:
                logger.exception("Worker %d is given up:", number)
            finally:
                if worker is not None:
                    ray.kill(worker)
                if self._living.pop(number, None) is not None:
                    with self._lock:
                        self.restarts += not self._ending.is_set()
            lived = time.monotonic() - began
            pause = 0.0 if job is not None or lived > LONGEST_PAUSE else min(max(1.0, 2 * pause), LONGEST_PAUSE)

    def _placed(self, answer: Any, number: int) -> Place:
        """Where a worker is, as soon as it is anywhere. Raises InputError where it cannot be used."""
        began, told = time.monotonic(), False
        while not ray.wait([answer], timeout=IDLE)[0]:
            if self._ending.is_set():
                raise _Ending
            if not told and time.monotonic() - began > PATIENCE:
                logger.info("Worker %d is not there yet: it starts, or waits for a place in the cluster.", number)
                told = True
        place: Place = ray.get(answer)
        if place.lacks is not None:
            raise InputError(f"it cannot be used on {place.host}. {place.lacks}")
        ours = versions()
        differing = [
            f"{name} {version} (here {ours[name]})" for name, version in place.versions.items() if version != ours[name]
        ]
        if differing:
            raise InputError(f"{place.host} has {', '.join(differing)}: install the same on all machines.")
        return place

    def _next(self, number: int, gone: Any) -> Record:
        """The next job for a worker. Raises RayError when the worker dies, of which `gone` tells."""
        pause = 0.0
        while not self._ending.is_set():
            if ray.wait([gone], timeout=pause)[0]:
                ray.get(gone)
            record = self.queue.claim(number)
            if record is not None:
                return record
            pause = IDLE
        raise _Ending

    def _make(self, record: Record, number: int, worker: Any, place: Place) -> None:
        """Have a job made, and bring it to its end, or back into the queue. Raises what has ended its worker."""
        output = self.folder.output(record.client, record.id)
        try:
            end = made_before(output) or self._follow(record, number, worker, output)
        except Exception as error:
            crashed = self._counts(record, worker, place, error)
            ray.kill(worker)
            self._take_all(record)
            released = self.queue.release(number, crashed=crashed)
            if released is not None and not isinstance(error, _Ending):
                logger.warning("Job %s, which worker %d made, is %s now.", record.id, number, released.state)
            raise
        self._nodes_lost.pop(record.id, None)
        self.queue.end(record.id, number, end.state, error=end.error, result=end.result)

    def _follow(self, record: Record, number: int, worker: Any, output: OutputFiles) -> End:
        """Let a worker make a job, and take what it finishes."""
        attempt = self.storage.attempt(record)
        attempt.give(self.folder, record)
        answer = worker.make.remote(record, str(self.folder.path))
        told, since = Progress(), None
        while not ray.wait([answer], timeout=IDLE)[0]:
            if self._ending.is_set():
                raise _Ending
            end = due(self.queue.get(record.id))
            since = None if end is None else since or time.monotonic()
            if since is not None and time.monotonic() - since > self.grace:
                ray.kill(worker)  # it is stuck in one call
            with suppress(GetTimeoutError):
                progress: Progress = ray.get(worker.follow.remote(end), timeout=PATIENCE)
                if progress != told:
                    self.queue.report(record.id, number, progress)
                if progress.windows_done > told.windows_done:
                    self._take(attempt, output)
                told = progress
        made: End = ray.get(answer)
        if made.state == "done":
            attempt.take_video(output)
        else:
            self._take(attempt, output)
        self._remove(attempt)
        return made

    def _counts(self, record: Record, worker: Any, place: Place, error: Exception) -> bool:
        """Whether the end of a worker counts as one that its job may have caused."""
        if isinstance(error, _Ending):
            return False
        if due(self.queue.get(record.id)) is not None:
            return True
        if isinstance(error, RayTaskError):
            error = error.cause
        elsewhere = isinstance(error, StorageError) or (
            isinstance(error, RayActorError) and not self._died_alone(worker, place.node)
        )
        self._nodes_lost[record.id] += elsewhere
        return not elsewhere or self._nodes_lost[record.id] > NODES

    def _died_alone(self, worker: Any, node: str) -> bool:
        """Whether a worker that has not answered is dead although its node lives; waits until Ray knows."""
        end = time.monotonic() + VERDICT
        while time.monotonic() < end and not self._ending.wait(IDLE):
            died = False
            try:
                ray.get(worker.follow.remote(None), timeout=PATIENCE)
                return False  # it was out of reach
            except ActorDiedError:
                died = True
            except RayError:  # not known yet
                pass
            if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
                return False
            if died:
                return True
        return True

    # --- the storage

    def _take_all(self, record: Record) -> None:
        """Take what an attempt that is over has left."""
        attempt = self.storage.attempt(record)
        if self._take(attempt, self.folder.output(record.client, record.id)):
            self._remove(attempt)

    def _take(self, attempt: Attempt, output: OutputFiles) -> bool:
        try:
            attempt.take(output)
        except StorageError as error:
            logger.warning("%s", error)
            return False
        return True

    def _remove(self, attempt: Attempt) -> None:
        try:
            attempt.remove()
        except StorageError as error:
            logger.warning("%s", error)
