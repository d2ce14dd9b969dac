"""A service under load, over a socket of this machine: many clients at once, memory over many jobs, models reused.

    python -m benchmarks.service [--clients 100] [--jobs 1000] [--device cpu]

It starts `infinitetalk serve` on the random tiny models, whose jobs take half a second. Run from the root of the
repository; needs the extra [serve] and httpx.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx
from wanvideo_infinitetalk import assets
from wanvideo_infinitetalk.cli.tiny_models import make_tiny
from wanvideo_infinitetalk.service.queue import ENDED, Queue

SETTINGS = {"width": 32, "height": 32, "frames": 9, "motion_frames": 5, "steps": 1, "max_frames": 17}
"""Of a job of three windows."""


@contextmanager
def service(folder: Path, device: str) -> Iterator[tuple[str, int]]:
    """The address and the process of a service in `folder`."""
    tiny = make_tiny(folder / "models", random=True).model_files
    models = [part for name, path in vars(tiny).items() if path for part in (f"--{name.replace('_', '-')}", str(path))]
    argv = [sys.executable, "-m", "wanvideo_infinitetalk.cli", "serve", str(folder / "service"), *models]
    with (folder / "log").open("w") as log:
        argv += ["--port", "0", "--device", device]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("service: ").strip(), process.pid
    finally:
        process.terminate()
        process.wait()


def uploads(http: httpx.Client) -> dict[str, Any]:
    """A job of the demo's image and recording."""
    ids = {}
    for kind, name in (("image", "portrait.png"), ("audio", "speech.wav")):
        with as_file(files(assets) / name) as path:
            ids[kind] = http.post(f"/api/uploads/{kind}", content=path.read_bytes()).raise_for_status().json()["id"]
    return SETTINGS | {"image": ids["image"], "audio": [ids["audio"]]}


def client(address: str, number: int) -> tuple[float, float, int]:
    """What one client does; seconds until its job was accepted and until it ended, and the bytes of its video."""
    with httpx.Client(base_url=address, timeout=600) as http:
        job = uploads(http) | {"seed": number}
        begin = time.perf_counter()
        id = http.post("/api/jobs", json=job).raise_for_status().json()["id"]
        accepted = time.perf_counter() - begin
        with http.stream("GET", f"/api/jobs/{id}/events") as answer:
            last = [line for line in answer.iter_lines() if line.startswith("event: ")][-1]
        assert last == "event: done", last
        assert http.get(f"/api/jobs/{id}").raise_for_status().json()["state"] == "done"
        video = http.get(f"/api/jobs/{id}/video", headers={"Range": "bytes=0-"})
        assert video.status_code == 206
        return accepted, time.perf_counter() - begin, len(video.content)


def first_step(http: httpx.Client, job: dict[str, Any]) -> float:
    """Seconds from the start of a job to its first step."""
    id = http.post("/api/jobs", json=job).raise_for_status().json()["id"]
    found: float | None = None
    with http.stream("GET", f"/api/jobs/{id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                now = json.loads(line.removeprefix("data: "))
                if found is None and (now["progress"]["step"] or now["state"] in ENDED):
                    found = time.time() - now["started"]
    assert found is not None
    return found


def memory(pid: int) -> dict[str, float]:
    """MiB that a service and its worker hold (Linux)."""

    def held(process: int) -> float:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
    found = {"service": held(pid)}
    for child in map(int, children):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            found["worker"] = held(child)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), args.device) as (address, pid),
        httpx.Client(base_url=address, timeout=600) as http,
    ):
        job = uploads(http)
        times = [first_step(http, job | {"seed": seed}) for seed in range(3)]
        print(f"first step after {', '.join(f'{seconds:.2f}' for seconds in times)} s (jobs 1, 2, 3)")

        if args.clients:
            begin = time.perf_counter()
            with ThreadPoolExecutor(args.clients) as pool:
                done = list(pool.map(lambda number: client(address, number), range(args.clients)))
            accepted, ended = [[row[column] for row in done] for column in (0, 1)]
            print(
                f"{args.clients} clients at once: {time.perf_counter() - begin:.1f} s; a job was accepted after "
                f"{statistics.median(accepted):.2f} s (median; at most {max(accepted):.2f}), the last one ended after "
                f"{max(ended):.1f} s"
            )

        queue = Queue(Path(folder) / "service" / "jobs.sqlite")
        before = queue.counts()["done"]
        held: dict[int, dict[str, float]] = {}
        for number in range(args.jobs):
            while queue.counts()["queued"] > 50:
                time.sleep(0.1)
            http.post("/api/jobs", json=job | {"seed": number}).raise_for_status()
            done_now = queue.counts()["done"] - before
            if done_now >= 100 and 100 not in held:
                held[100] = memory(pid)
        while queue.counts()["queued"] + queue.counts()["running"]:
            time.sleep(0.2)
        assert queue.counts()["failed"] == 0
        held[args.jobs] = memory(pid)
        for count, rows in held.items():
            print(f"after {count} jobs: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in rows.items()))
        queue.close()


if __name__ == "__main__":
    main()
