"""The HTTP API of a service: uploads, jobs, their progress and videos.

Clients name files by ids that this module has made; each client sees its own. What it rejects is answered with a status
from 400 to 499 and {"detail": "one sentence"}.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
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
from ..pipeline.presets import PRESETS
from ..wanvideo.errors import InfiniteTalkError
from .access import Access, is_loopback
from .queue import ENDED, PRIORITIES, Queue, Record
from .requests import LONGEST, Requests, TooManyError
from .settings import read_json, schema
from .workers import AnyWorkers

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two looks at a job whose progress is followed."""

Kind = Literal["image", "mask", "audio", "video"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
Token = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def create_app(requests: Requests, workers: AnyWorkers, access: Access | None = None) -> FastAPI:
    """The API of a service.

    Args:
        workers: who makes the jobs.
        access: None: everybody on this machine is one client, and requests for other hosts are rejected.
    """
    access = access or Access()
    queue, view = requests.queue, requests.view
    app = FastAPI(
        title="InfiniteTalk",
        version=__version__,
        description="An image and a recording of speech become a talking video.",
    )
    app.add_middleware(SameSite, local=not access.tokens)
    _answer_errors(app, requests)

    def client_of(token: Token) -> str:
        client = access.client(None if token is None else token.credentials)
        if client is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "This needs a token: send the header Authorization: Bearer TOKEN.", headers)
        return client

    Client = Annotated[str, Depends(client_of)]

    def job_of(id: str, client: Client) -> Record:
        job = requests.owned(id, client)
        if job is None:
            raise HTTPException(404, "There is no such job of yours.")
        return job

    Job = Annotated[Record, Depends(job_of)]

    # --- uploads

    @app.post("/api/uploads/{kind}", status_code=201, openapi_extra={"requestBody": BYTES})
    async def upload(kind: Kind, request: Request, client: Client) -> Any:
        """Send a file, as it is, as the body of the request; its id stands for it in jobs."""
        id, path = requests.new_upload(client, kind)
        try:
            room = requests.room(client)
            with path.open("xb") as file:
                size = await _receive(request, room, requests.too_large, file.write)
            await run_in_threadpool(requests.read, kind, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return {"id": id, "kind": kind, "bytes": size}

    @app.delete("/api/uploads/{id}", status_code=204)
    def delete_upload(id: str, client: Client) -> None:
        """Delete a file; jobs that name it and have not ended fail."""
        if not requests.delete_upload(client, id):
            raise HTTPException(404, "There is no such upload of yours.")

    # --- jobs

    @app.post("/api/jobs", status_code=201, openapi_extra={"requestBody": JOB})
    async def submit(request: Request, client: Client) -> Any:
        """Have a video made: files by the ids of their uploads, and settings."""
        body, most = bytearray(), requests.limits.request
        await _receive(request, most, f"A job may have {most:,} bytes.", body.extend)
        return view(await run_in_threadpool(requests.accept, read_json(bytes(body), "The job"), client))

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
        if not requests.delete(job):
            raise HTTPException(409, f"The job is {job.state}: cancel it first.")

    @app.get("/api/jobs/{id}/events", response_class=EventSourceResponse)
    async def events(job: Job) -> AsyncIterator[ServerSentEvent]:
        """The job as server-sent events: at once, after each change, and when it has ended, which is the last one."""
        told: dict[str, Any] = {}
        while told.get("state") not in ENDED:
            now = await run_in_threadpool(requests.owned, job.id, job.client)
            if now is None:  # deleted
                return
            if (seen := await run_in_threadpool(view, now)) != told:
                yield ServerSentEvent(data=seen, event=now.state)
                told = seen
            await asyncio.sleep(TICK)

    @app.get("/api/jobs/{id}/video", response_class=FileResponse)
    def video(id: str, token: Token, ticket: str = "") -> FileResponse:
        """The video; while it is made, the windows that are finished, a fragmented MP4 that grows. Takes ranges.

        The address in a job's `video` holds a ticket, with which players need no token.
        """
        job = requests.by_ticket(id, ticket) or job_of(id, client_of(token))
        path = requests.video(job)
        if path is None:
            raise HTTPException(404, f"The job is {job.state}, and no window of it is finished.")
        kept = "private" if job.state == "done" else "no-store"
        return FileResponse(path, media_type="video/mp4", headers={"Cache-Control": kept})

    # --- the service

    @app.get("/api/presets")
    def presets(client: Client) -> dict[str, dict[str, Any]]:
        """What each preset stands for."""
        return PRESETS

    @app.get("/api/doctor")
    def doctor(client: Client) -> dict[str, Any]:
        """What runs where a worker is: every attention mode and quantization, tried once while the service lives."""
        return examined()

    examined = app.state.doctor = _Once(workers.examine)
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
                "additionalProperties": False,
                "properties": {
                    "image": _ID,
                    "video": _ID,
                    "audio": {"type": "array", "items": _ID, "maxItems": 4},
                    "masks": {"type": "array", "items": _ID, "maxItems": 4},
                    "references": {"type": "array", "items": _ID, "maxItems": 4},
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


# -------------------------------------------------------------------------------------------------------------- answers


def _answer_errors(app: FastAPI, requests: Requests) -> None:
    """Let each rejection be one sentence."""

    @app.exception_handler(InfiniteTalkError)
    async def rejected(request: Request, error: InfiniteTalkError) -> JSONResponse:
        return _rejection(429 if isinstance(error, TooManyError) else 422, requests.without_paths(str(error)))

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


class _Counts(Collector):
    """The queue and the workers, as they are when Prometheus asks."""

    def __init__(self, queue: Queue, workers: AnyWorkers) -> None:
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
