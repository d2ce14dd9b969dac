"""The HTTP API of a service: uploads, jobs, their progress and videos.

Clients name files by ids that this module has made; each client sees its own. What it rejects is answered with a status
from 400 to 499 and {"detail": "one sentence"}.
"""

import asyncio
import logging
import multiprocessing
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..cli.doctor import examine
from ..media.audio import read_audio
from ..media.images import load_image
from ..media.masks import load_mask
from ..media.video import VideoFrames
from ..pipeline.bounds import shown
from ..pipeline.make_video import check, choose_device, named
from ..pipeline.presets import PRESETS
from ..wanvideo.errors import InfiniteTalkError, InputError
from .access import Access, is_loopback
from .folder import ServiceFolder, new_id
from .queue import ENDED, PRIORITIES, Queue, Record
from .settings import read_json, schema, settings_of
from .workers import Workers

__all__ = ["Limits", "create_app"]

logger = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two looks at a job whose progress is followed."""

State = Literal["queued", "running", "done", "failed", "cancelled"]

LONGEST = 7 * 24 * 3600.0
"""Seconds that a time limit may have."""

KINDS: dict[str, Callable[[Path], object]] = {
    "image": load_image,
    "mask": load_mask,
    "audio": read_audio,
    "video": lambda path: VideoFrames(path)[0],
}
"""Kind of an upload -> its reader, which raises InputError for what it cannot read."""


@dataclass(frozen=True)
class Limits:
    """What one client may ask for: bytes of an upload and of all of them, bytes of a request, jobs that wait."""

    upload: int = 512 * 2**20
    uploads: int = 20 * 2**30
    request: int = 2**20
    waiting: int = 100


def create_app(
    folder: ServiceFolder,
    base: Mapping[str, Any],
    workers: Workers,
    access: Access | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """The API of a service.

    Args:
        base: the service's own settings, see `settings.build`.
        workers: who makes the jobs.
        access: None: everybody on this machine is one client, and requests for other hosts are rejected.
    """
    access, limits = access or Access(), limits or Limits()
    queue = folder.queue()
    checking = threading.Semaphore(2)  # inputs are decoded whole: so many at a time bound the memory

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(
        title="InfiniteTalk",
        version=__version__,
        description="An image and a recording of speech become a talking video.",
        lifespan=lifespan,
    )
    app.add_middleware(SameSite, local=not access.tokens)
    _answer_errors(app, folder, base)

    def client_of(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> str:
        client = access.client(None if given is None else given.credentials)
        if client is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "This needs a token: send the header Authorization: Bearer TOKEN.", headers)
        return client

    Client = Annotated[str, Depends(client_of)]

    def job_of(id: str, client: Client) -> Record:
        return _owned(queue, id, client)

    Job = Annotated[Record, Depends(job_of)]
    view = partial(_view, folder, queue, base)

    # --- uploads

    @app.post("/api/uploads/{kind}", status_code=201, openapi_extra={"requestBody": BYTES})
    async def upload(kind: Literal["image", "mask", "audio", "video"], request: Request, client: Client) -> Any:
        """Send a file, as it is, as the body of the request; its id stands for it in jobs."""
        uploads, id = folder.uploads(client), new_id()
        path = folder.upload(client, id)
        uploads.mkdir(parents=True, exist_ok=True)
        used = sum(file.stat().st_size for file in uploads.iterdir())
        most = min(limits.upload, limits.uploads - used)
        sentence = (
            f"An upload may have {limits.upload:,} bytes, and all of a client {limits.uploads:,}: send a smaller "
        )
        sentence += "file, or delete what is no longer needed."
        try:
            with path.open("xb") as file:
                size = await _receive(request, most, sentence, file.write)
            await run_in_threadpool(readable, kind, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return {"id": id, "kind": kind, "bytes": size}

    def readable(kind: str, path: Path) -> None:
        with checking:
            KINDS[kind](path)

    @app.delete("/api/uploads/{id}", status_code=204)
    def delete_upload(id: str, client: Client) -> None:
        """Delete a file; jobs that name it and have not ended fail."""
        try:
            folder.upload(client, id).unlink()
        except (KeyError, FileNotFoundError):
            raise HTTPException(404, "There is no such upload of yours.") from None

    # --- jobs

    @app.post("/api/jobs", status_code=201, openapi_extra={"requestBody": JOB})
    async def submit(request: Request, client: Client) -> Any:
        """Have a video made: files by the ids of their uploads, and settings."""
        body = bytearray()
        await _receive(request, limits.request, f"A job may have {limits.request:,} bytes.", body.extend)
        return view(await run_in_threadpool(accept, bytes(body), client))

    def accept(body: bytes, client: str) -> Record:
        given = read_json(body, "The job")
        priority, limit = _orders(given)
        wanted = _checked_request(given, folder, client)
        if queue.counts(client)["queued"] >= limits.waiting:
            raise HTTPException(429, f"{limits.waiting} of your jobs wait already: send more when some have begun.")
        id = new_id()
        output = folder.output(client, id)
        try:
            job = named(folder.job_of(id, client, wanted, base))
            with checking:
                # Whether the attention mode runs there, the worker's GPU says.
                check(
                    replace(job, device="cpu", text_encoder_device="cpu", attention_mode="sdpa", compile_settings=None)
                )
        except InfiniteTalkError:
            shutil.rmtree(output.video.parent, ignore_errors=True)
            raise
        return queue.add(id, client, wanted, priority, limit)

    @app.get("/api/jobs")
    def jobs(client: Client, state: State | None = None, last: int = 100) -> list[dict[str, Any]]:
        """Your latest jobs, the newest first."""
        return [view(job) for job in queue.jobs(client, state, max(0, min(last, 1000)))]

    @app.get("/api/jobs/{id}")
    def job(job: Job) -> dict[str, Any]:
        """A job, and how far it is."""
        return view(job)

    @app.post("/api/jobs/{id}/cancel")
    def cancel(job: Job) -> dict[str, Any]:
        """Cancel a job. One that runs ends with the next evaluation of the model; one that has ended stays as it is."""
        return view(queue.cancel(job.id))

    @app.delete("/api/jobs/{id}", status_code=204)
    def delete(job: Job) -> None:
        """Delete a job that has ended, and its video."""
        if not queue.delete(job.id):
            raise HTTPException(409, f"The job is {job.state}: cancel it first.")
        shutil.rmtree(folder.output(job.client, job.id).video.parent, ignore_errors=True)

    @app.get("/api/jobs/{id}/events", response_class=EventSourceResponse)
    async def events(job: Job) -> AsyncIterator[ServerSentEvent]:
        """The job as server-sent events: at once, after each change, and when it has ended, which is the last one."""
        told = None
        while True:
            try:
                job = queue.get(job.id)  # a look-up by its key, which never waits for who writes
            except KeyError:  # deleted
                return
            now = view(job)
            if now != told:
                yield ServerSentEvent(data=now, event=job.state)
                told = now
            if job.state in ENDED:
                return
            await asyncio.sleep(TICK)

    @app.get("/api/jobs/{id}/video", response_class=FileResponse)
    def video(job: Job) -> FileResponse:
        """The video; while it is made, the windows that are finished, a fragmented MP4 that grows. Takes ranges."""
        files = folder.output(job.client, job.id)
        for path in (files.video, files.partial):
            if path.is_file():
                headers = {"Cache-Control": "private" if path is files.video else "no-store"}
                return FileResponse(path, media_type="video/mp4", headers=headers)
        raise HTTPException(404, f"The job is {job.state}, and no window of it is finished.")

    # --- the service

    @app.get("/api/presets")
    def presets(client: Client) -> dict[str, dict[str, Any]]:
        """What each preset stands for."""
        return PRESETS

    @app.get("/api/doctor")
    def doctor(client: Client) -> dict[str, Any]:
        """What runs on this machine: every attention mode and quantization, tried once while the service lives."""
        return examined()

    examined = _Once(partial(_examine, str(workers.devices[0])))
    registry = CollectorRegistry()
    registry.register(_Counts(queue, workers))
    ProcessCollector(registry=registry)

    @app.get("/metrics")
    def metrics(client: Client) -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/health")
    def health() -> dict[str, int]:
        """Workers that live, of all."""
        return {"workers": len(workers.devices), "alive": workers.alive}

    return app


BYTES = {
    "required": True,
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}

_ID = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
JOB = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["audio"],
                "additionalProperties": False,
                "properties": {
                    "image": _ID,
                    "video": _ID,
                    "audio": {"type": "array", "items": _ID, "minItems": 1, "maxItems": 4},
                    "masks": {"type": "array", "items": _ID, "maxItems": 4},
                    "priority": {"type": "integer", "minimum": PRIORITIES[0], "maximum": PRIORITIES[-1]},
                    "time_limit": {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST},
                    **schema(),
                },
            }
        }
    },
}


# ------------------------------------------------------------------------------------------------------------- requests


class SameSite:
    """A layer around an app that rejects what pages of other sites make a browser send.

    Args:
        local: the app is for this machine alone: a name of another host that leads here is another site, too.
    """

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if self.local and not is_loopback(_name_of(host)):
                answer = _rejection(400, "This service is for its own machine: ask for 127.0.0.1 or localhost.")
            elif origin is not None and origin.partition("://")[2] != host:
                answer = _rejection(403, "Requests from pages of other sites are rejected.")
        await answer(scope, receive, send)


def _name_of(host: str) -> str:
    """A host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _rejection(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


async def _receive(request: Request, most: int, sentence: str, take: Callable[[bytes], object]) -> int:
    """Hand the body of a request out in pieces; returns its bytes. Status 413 with `sentence` above `most`."""
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise HTTPException(413, sentence)
            take(piece)
    except ClientDisconnect:
        raise HTTPException(400, "The connection ended before all was sent.") from None
    return size


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


def _checked_request(given: Mapping[str, Any], folder: ServiceFolder, client: str) -> dict[str, Any]:
    """A job whose settings are of their types and whose files are uploads of its client."""
    settings = settings_of(given, FILES)
    if not given.get("audio"):
        raise InputError('"audio" is missing: give a list with the upload of each speaker\'s recording.')
    for name, several in FILES.items():
        value = given.get(name)
        if value is None:
            continue
        ids = value if several else [value]
        if not isinstance(ids, list) or len(ids) > 4:
            raise InputError(f"{name} {shown(value)} cannot be used: give a list of up to four uploads.")
        for id in ids:
            if not isinstance(id, str) or not _exists(folder, client, id):
                raise InputError(f"{name} {shown(id)} is no upload of yours: send the file first.")
        settings[name] = value
    return settings


FILES = {"image": False, "video": False, "audio": True, "masks": True}
"""Fields that name uploads -> whether they are lists."""


def _exists(folder: ServiceFolder, client: str, id: str) -> bool:
    try:
        return folder.upload(client, id).is_file()
    except KeyError:
        return False


def _owned(queue: Queue, id: str, client: str) -> Record:
    try:
        job = queue.get(id)
    except (KeyError, UnicodeEncodeError):
        job = None
    if job is None or job.client != client:
        raise HTTPException(404, "There is no such job of yours.")
    return job


# -------------------------------------------------------------------------------------------------------------- answers


def _view(folder: ServiceFolder, queue: Queue, base: Mapping[str, Any], job: Record) -> dict[str, Any]:
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
        "ahead": queue.ahead(job) if job.state == "queued" else 0,
        "progress": vars(job.progress),
        "error": None if job.error is None else _without_paths(job.error, folder, base),
        "result": job.result,
        "request": job.request,
    }


def _without_paths(sentence: str, folder: ServiceFolder, base: Mapping[str, Any]) -> str:
    """A sentence without the folders of this machine: uploads stay as their ids, models as their names."""
    for part in ("uploads", "jobs"):
        for client in (folder.path / "clients").iterdir():
            sentence = sentence.replace(f"{client / part}/", "")
    for model in (*vars(base["files"]).values(), *(lora.path for lora in base.get("loras", ()))):
        if model is not None:
            sentence = sentence.replace(str(model), Path(model).name)
    return sentence


def _answer_errors(app: FastAPI, folder: ServiceFolder, base: Mapping[str, Any]) -> None:
    """Let each rejection be one sentence."""

    @app.exception_handler(InfiniteTalkError)
    async def rejected(request: Request, error: InfiniteTalkError) -> JSONResponse:
        return _rejection(422, _without_paths(str(error), folder, base))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _rejection(422, f"{where} cannot be used: {first['msg']}.")

    @app.exception_handler(FileNotFoundError)
    async def moved(request: Request, error: FileNotFoundError) -> JSONResponse:
        return _rejection(409, "The file was moved at this moment: ask again.")

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: Request, error: StarletteHTTPException) -> JSONResponse:
        sentence = error.detail
        if sentence == HTTPStatus(error.status_code).phrase:  # of the framework
            sentence = f"{sentence}: see /docs for what can be asked for."
        return JSONResponse({"detail": sentence}, error.status_code, error.headers)


class _Once:
    """What `compute` gives, computed by the first call; calls meanwhile wait for it."""

    def __init__(self, compute: Callable[[], dict[str, Any]]) -> None:
        self._compute, self._lock = compute, threading.Lock()
        self._value: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        with self._lock:
            if self._value is None:
                self._value = self._compute()
            return self._value


def _examine(device: str) -> dict[str, Any]:
    """The doctor's report, from a process of its own, whose GPU memory is free again afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_report, device).result()


def _report(device: str) -> dict[str, Any]:
    report: dict[str, Any] = examine(choose_device(device)).as_json()
    return report


class _Counts(Collector):
    """The queue and the workers, as they are when Prometheus asks."""

    def __init__(self, queue: Queue, workers: Workers) -> None:
        self.queue, self.workers = queue, workers

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("infinitetalk_jobs", "Jobs in each state", labels=["state"])
        for state, count in self.queue.counts().items():
            jobs.add_metric([state], count)
        yield jobs
        yield GaugeMetricFamily("infinitetalk_workers_alive", "Worker processes that live", self.workers.alive)
        yield CounterMetricFamily(
            "infinitetalk_worker_restarts", "Worker processes that died and were replaced", self.workers.restarts
        )
