"""The API: what clients can do; nothing they send makes it fail, leaves its folder, or reaches the files of others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from support.service_files import FRAMES, NO_WORKERS, SETTINGS, WINDOWS, base_of, write_inputs
from wanvideo_infinitetalk.cli.parser import main
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.pipeline.bounds import BOUNDS
from wanvideo_infinitetalk.pipeline.loaded_models import LoadedModels
from wanvideo_infinitetalk.pipeline.presets import SETTINGS as FIELDS
from wanvideo_infinitetalk.service import server, worker
from wanvideo_infinitetalk.service.access import Access, is_loopback
from wanvideo_infinitetalk.service.api import create_app
from wanvideo_infinitetalk.service.folder import ServiceFolder
from wanvideo_infinitetalk.service.queue import Progress, Queue
from wanvideo_infinitetalk.service.requests import KINDS, Limits, Requests
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError

ALICE, BOB = "alice-has-this-token", "bob-has-another-token"


@dataclass
class Api:
    """The API in this process; jobs are made when `work` is called."""

    http: TestClient
    folder: ServiceFolder
    queue: Queue
    base: dict
    inputs: dict[str, Path]
    loaded: LoadedModels = field(default_factory=LoadedModels)

    def upload(self, kind: str, name: str | None = None, **more) -> str:
        answer = self.http.post(f"/api/uploads/{kind}", content=self.inputs[name or kind].read_bytes(), **more)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def request(self, **more) -> dict[str, Any]:
        return SETTINGS | {"image": self.upload("image"), "audio": [self.upload("audio")]} | more

    def submit(self, **more) -> dict[str, Any]:
        answer = self.http.post("/api/jobs", json=self.request(**more))
        assert answer.status_code == 201, answer.text
        return answer.json()

    def work(self) -> None:
        record = self.queue.claim(0)
        worker.run(self.queue, record, 0, self.folder, self.base, self.loaded)


@contextlib.contextmanager
def served(tiny: TinySet, tmp_path: Path, access: Access | None = None, limits: Limits | None = None) -> Iterator[Api]:
    folder, base = ServiceFolder.make(tmp_path / "service"), base_of(tiny)
    (tmp_path / "inputs").mkdir()
    inputs = write_inputs(tmp_path / "inputs")
    requests = Requests(folder, base, limits)
    with TestClient(create_app(requests, NO_WORKERS, access), base_url="http://127.0.0.1:8000") as http:
        yield Api(http, folder, requests.queue, base, inputs)
    requests.queue.close()


@pytest.fixture
def api(tiny_set: TinySet, tmp_path: Path) -> Iterator[Api]:
    with served(tiny_set, tmp_path) as api:
        yield api


def rejected(answer: httpx.Response, status: int, sentence: str = "") -> None:
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert re.search(sentence, detail), detail
    assert detail.endswith((".", "asked for."))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_image_and_recording_become_a_video(api: Api) -> None:
    job = api.submit(prompt="a face – 脸", priority=3, time_limit=600)
    assert (job["state"], job["priority"], job["time_limit"], job["ahead"]) == ("queued", 3, 600, 0)
    rejected(api.http.get(f"/api/jobs/{job['id']}/video"), 404, "no window of it is finished")
    api.work()
    job = api.http.get(f"/api/jobs/{job['id']}").json()
    assert (job["state"], job["error"]) == ("done", None)
    assert job["progress"]["windows_done"] == WINDOWS
    assert job["result"]["frames"] == FRAMES
    assert job["request"]["prompt"] == "a face – 脸"
    video = api.http.get(f"/api/jobs/{job['id']}/video")
    assert video.headers["content-type"] == "video/mp4"
    (api.folder.path.parent / "got.mp4").write_bytes(video.content)
    assert len(VideoFrames(api.folder.path.parent / "got.mp4")) == FRAMES
    with av.open(str(api.folder.path.parent / "got.mp4")) as container:
        carried = json.loads(container.metadata["comment"])
    assert carried.keys() == FIELDS.keys() - {"preset"}
    assert carried.items() >= (SETTINGS | {"prompt": "a face – 脸", "seed": 42, "scheduler": "multitalk"}).items()


def test_humo_by_reference_images_with_speech_and_without(api: Api, tiny_set: TinySet) -> None:
    api.base |= {"files": tiny_set.humo_files(), "mode": "humo", "width": 64, "height": 48, "steps": 1, "max_frames": 5}
    references, audio = [api.upload("image"), api.upload("image")], [api.upload("audio")]
    for request in ({"references": references}, {"references": references[:1], "audio": audio}):
        answer = api.http.post("/api/jobs", json=request)
        assert answer.status_code == 201, answer.text
        api.work()
        job = api.http.get(f"/api/jobs/{answer.json()['id']}").json()
        assert (job["state"], job["result"].get("frames")) == ("done", 5), job["error"]
    rejected(api.http.post("/api/jobs", json={"image": references[0]}), 422, "neither image nor source video")
    rejected(api.http.post("/api/jobs", json={"references": audio}), 422, "no upload of yours of the kind image")


def test_a_video_is_given_in_ranges_while_it_grows_and_when_it_is_whole(api: Api) -> None:
    job = api.submit()
    address = f"/api/jobs/{job['id']}/video"
    files = api.folder.output("local", job["id"])
    for path, kept in ((files.partial, "no-store"), (files.video, "private")):
        path.write_bytes(bytes(range(100)))
        if path is files.video:
            api.queue.claim(0)
            api.queue.end(job["id"], 0, "done")
        whole = api.http.get(address)
        assert (whole.content, whole.headers["cache-control"]) == (bytes(range(100)), kept)
        part = api.http.get(address, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
        assert part.headers["content-range"] == "bytes 10-19/100"
        assert api.http.get(address, headers={"Range": "bytes=90-"}).content == bytes(range(90, 100))
        assert api.http.get(address, headers={"Range": "bytes=-5"}).content == bytes(range(95, 100))
        assert api.http.get(address, headers={"Range": "bytes=200-"}).status_code == 416


def test_events_tell_each_change_and_end_with_the_job(api: Api) -> None:
    job = api.submit()
    record = api.queue.claim(0)

    def live() -> None:
        for done in (1, 2):
            time.sleep(0.4)
            api.queue.report(record.id, 0, Progress("Generating", done, WINDOWS, 1, 1))
        time.sleep(0.4)
        api.queue.end(record.id, 0, "done", result={"frames": FRAMES})

    thread = threading.Thread(target=live)
    thread.start()
    answer = api.http.get(f"/api/jobs/{job['id']}/events")
    thread.join()
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", answer.text.replace("\r\n", "\n"))
    assert [name for name, _ in events] == ["running"] * (len(events) - 1) + ["done"]
    done = [json.loads(data)["progress"]["windows_done"] for _, data in events]
    assert 2 <= len(events) <= 4  # a slow machine sees several changes at once
    assert (done, done[-1]) == (sorted(done), 2)


def test_jobs_are_listed_cancelled_and_deleted(api: Api) -> None:
    first, second = api.submit(), api.submit()
    assert [job["id"] for job in api.http.get("/api/jobs").json()] == [second["id"], first["id"]]
    assert second["ahead"] == 1
    rejected(api.http.delete(f"/api/jobs/{second['id']}"), 409, "The job is queued: cancel it first")
    assert api.http.post(f"/api/jobs/{second['id']}/cancel").json()["state"] == "cancelled"
    assert [job["id"] for job in api.http.get("/api/jobs", params={"state": "queued"}).json()] == [first["id"]]
    assert api.http.delete(f"/api/jobs/{second['id']}").status_code == 204
    rejected(api.http.get(f"/api/jobs/{second['id']}"), 404, "no such job of yours")
    api.queue.claim(0)
    assert api.http.post(f"/api/jobs/{first['id']}/cancel").json()["cancelling"]


def test_what_the_library_rejects_is_said_when_the_job_is_sent(api: Api) -> None:
    image, audio = api.upload("image"), api.upload("audio")
    good = SETTINGS | {"image": image, "audio": [audio]}
    for change, sentence in (
        ({"image": audio}, f"image {audio} is no upload of yours of the kind image"),
        ({"audio": [image]}, "of the kind audio"),
        ({"image": None}, "either an image or a source video"),
        ({"audio": [audio, audio], "masks": [api.upload("mask", "image")]}, "mask"),
        ({"frames": 10}, "4n"),
        ({"attention_mode": "nothing"}, "attention mode 'nothing'"),
        ({"quantization": "nothing"}, "nothing"),
        ({"preset": "slow"}, "no preset 'slow'"),
    ):
        answer = api.http.post("/api/jobs", json=good | change)
        rejected(answer, 422, sentence)
        assert str(api.folder.path) not in answer.text
    assert api.queue.jobs() == []
    assert not [name for name in files_in(api.folder.path) if "/jobs/" in name]


def test_errors_of_workers_name_no_folder_of_the_machine(api: Api) -> None:
    job = api.submit()
    record = api.queue.claim(0)
    upload = api.folder.upload("local", "image", record.request["image"])
    api.queue.end(record.id, 0, "failed", error=f"{upload} and {api.base['files'].model} cannot be used.")
    error = api.http.get(f"/api/jobs/{job['id']}").json()["error"]
    assert error == f"{upload.name} and {Path(api.base['files'].model).name} cannot be used."


def test_uploads_are_held_to_their_kind_and_size(tiny_set: TinySet, tmp_path: Path) -> None:
    limits = Limits(upload=50_000, uploads=80_000, request=2_000, waiting=1)
    with served(tiny_set, tmp_path, limits=limits) as api:
        rejected(api.http.post("/api/uploads/image", content=bytes(50_001)), 413, "An upload may have 50,000 bytes")
        rejected(api.http.post("/api/uploads/image", content=iter([bytes(30_000)] * 2)), 413)
        rejected(api.http.post("/api/uploads/image", content=b"text"), 422, "image")
        rejected(api.http.post("/api/uploads/audio", content=api.inputs["image"].read_bytes()), 422)
        rejected(api.http.post("/api/uploads/model", content=b"x"), 422, "kind cannot be used")
        assert not files_in(api.folder.uploads("local")), "what is rejected is not kept"
        kept = [api.upload("audio") for _ in range(2)]
        rejected(api.http.post("/api/uploads/audio", content=api.inputs["audio"].read_bytes()), 413, "delete")
        assert api.http.delete(f"/api/uploads/{kept[0]}").status_code == 204
        rejected(api.http.delete(f"/api/uploads/{kept[0]}"), 404)
        image = api.upload("image")
        good = SETTINGS | {"image": image, "audio": [kept[1]]}
        assert api.http.post("/api/jobs", json=good).status_code == 201
        rejected(api.http.post("/api/jobs", json=good), 429, "wait already")
        rejected(api.http.post("/api/jobs", json=good | {"prompt": "x" * 3_000}), 413, "2,000 bytes")


def test_recordings_that_memory_cannot_hold_are_rejected(api: Api) -> None:
    """A small compressed file may hold weeks of silence."""
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", 16000, 1, format="FLAC") as file:
        for _ in range(61):
            file.write(np.zeros(60 * 16000, np.int16))
    assert len(content.getvalue()) < 300_000
    rejected(api.http.post("/api/uploads/audio", content=content.getvalue()), 422, "lasts longer than 3600 s")


def test_clients_need_their_token_and_see_their_own_alone(tiny_set: TinySet, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"# who\nalice {ALICE}\n\nbob  {BOB}\n")
    with served(tiny_set, tmp_path, access=Access.from_file(tokens)) as api:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {ALICE}"}):
            answer = api.http.get("/api/jobs", headers=headers)
            rejected(answer, 401, "needs a token")
            assert answer.headers["www-authenticate"] == "Bearer"
        bob = {"Authorization": f"Bearer {BOB}"}
        api.http.headers["Authorization"] = f"Bearer {ALICE}"
        job = api.submit()
        api.folder.output("alice", job["id"]).partial.write_bytes(b"video")
        link = api.http.get(f"/api/jobs/{job['id']}").json()["video"]
        nobody = {"Authorization": ""}
        assert api.http.get(link, headers=nobody).content == b"video", "a player sends no token"
        rejected(api.http.get(f"{link}0", headers=nobody), 401)
        rejected(api.http.get(link.replace("/video", ""), headers=nobody), 401)
        for method, address in (
            ("GET", ""),
            ("GET", "/video"),
            ("GET", "/events"),
            ("POST", "/cancel"),
            ("DELETE", ""),
        ):
            rejected(api.http.request(method, f"/api/jobs/{job['id']}{address}", headers=bob), 404, "of yours")
        rejected(api.http.post("/api/jobs", json=job["request"], headers=bob), 422, "no upload of yours")
        rejected(api.http.delete(f"/api/uploads/{job['request']['image']}", headers=bob), 404, "of yours")
        assert api.http.get("/api/jobs", headers=bob).json() == []
        assert api.http.get(f"/api/jobs/{job['id']}").json()["state"] == "queued"
        assert api.http.get("/health", headers={"Authorization": ""}).json() == {"workers": 1, "alive": 1}


def test_every_address_but_the_health_needs_a_token(tiny_set: TinySet, tmp_path: Path) -> None:
    with served(tiny_set, tmp_path, access=Access({ALICE: "alice"})) as api:
        paths = api.http.get("/openapi.json").json()["paths"]
        assert len(paths) >= 10
        for path, methods in paths.items():
            for method in methods:
                status = api.http.request(method, path.replace("{kind}", "image").replace("{id}", "0" * 32)).status_code
                assert (status == 401) == (path != "/health"), path


@pytest.mark.parametrize(
    "text",
    ["", "# none\n", "alice\n", "alice short\n", f"Alice {ALICE}\n", f"../x {ALICE}\n", f"a {ALICE}\nb {ALICE}\n"],
)
def test_files_of_tokens_are_checked(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(InputError, match="tokens"):
        Access.from_file(tmp_path / "tokens")
    with pytest.raises(InputError, match="cannot be read"):
        Access.from_file(tmp_path)


def test_pages_of_other_sites_are_rejected(api: Api) -> None:
    for host in ("rebound.example", "rebound.example:8000", "[", "", "127.0.0.1.example"):
        rejected(api.http.get("/api/jobs", headers={"Host": host}), 400, "for its own machine")
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert api.http.get("/api/jobs", headers={"Host": host}).status_code == 200
    for origin in ("http://other.example", "null", "http://127.0.0.1:9999"):
        rejected(api.http.get("/api/jobs", headers={"Origin": origin}), 403, "other sites")
    assert api.http.get("/api/jobs", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200


HOSTILE: list[Any] = [
    *("../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x", "concat:a|b", "a\0b", "\ud800"),
    *("", " ", ".", "..", "0" * 31, "0" * 33, "A" * 32, "0" * 32, "%2e%2e%2f", "x" * 5000, "🙂", "'; DROP TABLE jobs"),
    *(None, True, 0, -1, 1e308, [], {}, [[]], [None], {"id": "0" * 32}, ["0" * 32] * 5),
]


def malformed(image: str, audio: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, address, arguments) of requests that ask for what cannot be."""
    good = SETTINGS | {"image": image, "audio": [audio]}
    post = "/api/jobs"
    for value in HOSTILE:
        for name in ("image", "audio", "masks", "video", "preset", "priority", "time_limit"):
            fine = (name == "masks" and value in (None, [])) or (name in ("time_limit", "preset") and value is None)
            fine |= name == "priority" and value in (0, -1) and not isinstance(value, bool)
            if not fine and not (name == "video" and value is None):
                yield "POST", post, {"content": json.dumps(good | {name: value})}
        if (
            isinstance(value, str)
            and value.isascii()
            and value.isprintable()
            and "/" not in value
            and value.strip(". ")
        ):
            for address in ("", "/video", "/events"):
                yield "GET", f"/api/jobs/{value}{address}", {}
            yield "POST", f"/api/jobs/{value}/cancel", {}
            yield "DELETE", f"/api/jobs/{value}", {}
            yield "DELETE", f"/api/uploads/{value}", {}
            yield "POST", f"/api/uploads/{value}", {"content": b"x"}
    for name in FIELDS:
        for value in ({}, "\ud800", [["a"]], -1e300, {"a": []}):
            yield "POST", post, {"content": json.dumps(good | {name: value})}
        if name in BOUNDS:
            yield "POST", post, {"content": json.dumps(good | {name: 10**30})}
            yield "POST", post, {"content": json.dumps(good | {name: float("nan")})}
    for name in ("files", "out", "device", "loras", "resume", "config", "../x", "__class__", ""):
        yield "POST", post, {"content": json.dumps(good | {name: "/etc/passwd"})}
    bodies = [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000, b"9" * 5_000]
    bodies += [json.dumps(good).encode()[:-1], b'{"steps": 1, "steps": 2}', b'{"steps": Infinity}', b"a=b&c=d"]
    for body in bodies:
        yield "POST", post, {"content": body}
    rng = random.Random(0)
    for kind in KINDS:
        for content in (
            b"",
            b"\0",
            rng.randbytes(2000),
            b"#EXTM3U\n/etc/passwd",
            b"ffconcat version 1.0\nfile '/etc/passwd'",
        ):
            yield "POST", f"/api/uploads/{kind}", {"content": content}
        for head in (b"RIFF\xff\xff\xff\xffWAVEfmt ", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x18ftypisom", b"OggS", b"GIF89a"):
            yield "POST", f"/api/uploads/{kind}", {"content": head + rng.randbytes(500)}
    yield "POST", "/api/uploads/image", {"files": {"file": ("../../x.png", b"x")}}
    for address in (
        "/api/uploads/..%2f..%2fx",
        "/api/uploads/%00",
        "/api/nothing",
        "/api/uploads",
        "/api/jobs/%ff/video",
    ):
        yield "POST", address, {"content": b"x"}
    for query in ({"state": "x"}, {"last": "x"}, {"last": "1e5"}):
        yield "GET", "/api/jobs", {"params": query}
    for method in ("PUT", "PATCH", "TRACE"):
        yield method, "/api/jobs", {}


def test_no_malformed_request_makes_it_fail_or_leaves_a_file(api: Api, record_property) -> None:
    job = api.submit()
    before = files_in(api.folder.path.parent)
    count = 0
    for method, address, arguments in malformed(job["request"]["image"], job["request"]["audio"][0]):
        answer = api.http.request(method, address, **arguments)
        assert 400 <= answer.status_code < 500, (method, address, arguments, answer.status_code, answer.text)
        assert isinstance(answer.json()["detail"], str), (method, address, answer.text)
        assert str(api.folder.path) not in answer.text
        count += 1
    assert count >= 300
    record_property("malformed requests", count)
    database = re.compile(r"jobs\.sqlite-(wal|shm)$")
    assert [f for f in files_in(api.folder.path.parent) if not database.search(f)] == [
        f for f in before if not database.search(f)
    ]
    assert [job["id"] for job in api.http.get("/api/jobs").json()] == [job["id"]]


def test_the_service_says_what_it_offers(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()
    body = schema["paths"]["/api/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"].keys() > FIELDS.keys()
    assert body["properties"]["steps"] == {"type": "integer", "minimum": 1, "maximum": 10_000}
    assert "low-memory" in api.http.get("/api/presets").json()
    api.submit()
    metrics = api.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'infinitetalk_jobs{state="queued"} 1.0' in metrics.text
    assert "infinitetalk_worker_restarts_total 0.0" in metrics.text


def test_the_doctor_is_asked_once(tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(NO_WORKERS, "examine", lambda: asked.append("it") or {"healthy": True})
    with served(tiny_set, tmp_path) as api:
        for _ in range(2):
            assert api.http.get("/api/doctor").json() == {"healthy": True}
    assert asked == ["it"]


@pytest.mark.slow
def test_the_doctor_reports_from_a_process_of_its_own(api: Api) -> None:
    report = api.http.get("/api/doctor").json()
    assert report["healthy"] is True
    assert {row["mode"] for row in report["kernels"]} >= {"sdpa", "sageattn_3_fp4"}


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("192.168.0.2", False), ("x", False)],
)
def test_other_hosts_need_tokens(host: str, local: bool, tmp_path: Path) -> None:
    assert is_loopback(host) == local
    if not local:
        with pytest.raises(InputError, match="--tokens FILE"):
            server.serve(tmp_path, {}, host=host)


def test_what_the_command_cannot_do_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(["serve", str(tmp_path), "--model", "m.safetensors", "--device", "cpu"]) == 2
    assert "give --vae, --text-encoder, --clip-vision, --wav2vec too" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--device", "cpu", "--port", "99999"]) == 2
    assert "port 99999, cannot be listened to" in capsys.readouterr().err
    monkeypatch.setitem(server.PACKAGES, "serve", {"no_such_module": "no-such-package"})
    assert main(["serve", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "(no-such-package)" in error
    assert f"{sys.executable} -m pip install '.[serve]'" in error


def test_the_command_serves_until_it_is_told_to_end(tiny_set: TinySet, tmp_path: Path) -> None:
    """The whole way, over a socket: models given by options, a job followed to its end, SIGTERM."""
    inputs = write_inputs(tmp_path)
    names = {"model": tiny_set.model, "adapter": tiny_set.adapter, "vae": tiny_set.vae, "wav2vec": tiny_set.wav2vec}
    names |= {"text-encoder": tiny_set.text_encoder, "clip-vision": tiny_set.clip_vision}
    models = [part for name, path in names.items() for part in (f"--{name}", str(path))]
    argv = [sys.executable, "-m", "wanvideo_infinitetalk.cli", "serve", str(tmp_path / "service"), *models]
    argv += ["--port", "0", "--device", "cpu", "--steps", "1", "--frames", "9", "--motion-frames", "5"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        address = process.stdout.readline().removeprefix("service: ").strip()
        with httpx.Client(base_url=address, timeout=60) as http:
            ids = {
                name: http.post(f"/api/uploads/{name}", content=path.read_bytes()).json()["id"]
                for name, path in inputs.items()
            }
            size = {"width": 32, "height": 32, "max_frames": FRAMES}
            job = http.post("/api/jobs", json=size | {"image": ids["image"], "audio": [ids["audio"]]}).json()
            with http.stream("GET", f"/api/jobs/{job['id']}/events") as answer:
                states = [line for line in answer.iter_lines() if line.startswith("event:")]
            assert states[-1] == "event: done"
            part = http.get(f"/api/jobs/{job['id']}/video", headers={"Range": "bytes=4-7"})
            assert (part.status_code, part.content) == (206, b"ftyp")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("given", [["--storage", "s3://bucket"], ["--workers", "2"], ["--worker-gpus", "1"]])
def test_options_of_many_machines_need_a_cluster(given: list[str], tmp_path: Path, capsys) -> None:
    assert main(["serve", str(tmp_path / "service"), *given]) == 2
    assert f"{given[0]} is for many machines: give --cluster ADDRESS too" in capsys.readouterr().err


def test_a_cluster_needs_ray(tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = server.importlib.util.find_spec
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(InfiniteTalkError, match=r"not installed \(ray\): .* -m pip install '\.\[cluster\]'"):
        server.serve(tmp_path / "service", base_of(tiny_set), cluster={"address": "127.0.0.1:6379"})
