"""Jobs on a Ray cluster of two nodes' processes, which declare a GPU each and compute on the CPU; needs Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]', or make test-cluster")

from support import service_files
from support.ray_cluster import LocalCluster, local_cluster
from support.service_files import FRAMES, base_of, ended, upload, wait_until, write_inputs
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.service import cluster as cluster_module
from wanvideo_infinitetalk.service.cluster import ClusterWorkers, Place, connect
from wanvideo_infinitetalk.service.folder import ServiceFolder
from wanvideo_infinitetalk.service.queue import Queue, Record
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    """Two that live at the start of a test: who kills one adds one."""
    with local_cluster(2) as cluster:
        yield cluster


@dataclass(frozen=True)
class Setup:
    """A service's folder, its queue, and a request for it."""

    folder: ServiceFolder
    queue: Queue
    base: dict[str, Any]
    request: dict[str, Any]

    def add(self, number: int, limit: float | None = None, **more: Any) -> Record:
        return self.queue.add(f"{number:0>32}", "local", self.request | {"seed": number} | more, 0, limit)

    def check_done(self) -> None:
        """Each job is done once, left one whole video, and nothing in the storage."""
        for record in self.queue.jobs():
            assert (record.state, record.error) == ("done", None)
            video = self.folder.output("local", record.id).video
            assert [path.name for path in video.parent.iterdir()] == ["video.mp4"]
            assert len(VideoFrames(video)) == FRAMES
        left = [path.name for path in (self.folder.path / "storage").iterdir()]
        assert [name for name in left if not name.endswith(".service")] == []

    def runs(self) -> Record | None:
        """A job that has finished a window, and not all of them."""
        return next((job for job in self.queue.running() if job.progress.windows_done == 1), None)


@pytest.fixture
def setup(tiny_set: TinySet, tmp_path: Path) -> Setup:
    folder = ServiceFolder.make(tmp_path / "service")
    return Setup(folder, folder.queue(), base_of(tiny_set), upload(folder, write_inputs(tmp_path)))


def workers_of(setup: Setup, nodes: LocalCluster, **more: Any) -> ClusterWorkers:
    given = {"device": "cpu", "gpus": 1, "retries": 0} | more
    return ClusterWorkers(setup.folder, setup.base, nodes.address, **given)


def place_of(workers: ClusterWorkers, slot: int) -> Place:
    return ray.get(workers._living[slot].place.remote(""))


def found(look: Callable[[], Any]) -> Any:
    """What `look` gives as soon as it is true."""
    got: list[Any] = []
    wait_until(lambda: got.append(look()) or got[-1], 300)
    return got[-1]


def test_jobs_are_made_on_two_nodes_and_survive_the_loss_of_one(setup: Setup, nodes: LocalCluster) -> None:
    with workers_of(setup, nodes) as workers:
        assert list(workers.devices) == ["cpu", "cpu"]
        wait_until(lambda: workers.alive == 2, 300)
        assert len({place_of(workers, slot).node for slot in range(2)}) == 2, "as their GPUs are"
        for number in range(6):
            setup.add(number)
        lost = found(setup.runs)
        nodes.kill(place_of(workers, lost.slot).node)
        wait_until(lambda: ended(setup.queue), 300)
        assert (workers.alive, workers.restarts) == (1, 1), "one waits for a place"
        again = setup.queue.get(lost.id)
        assert again.crashes == 0, "the node died, not the job"
        whole = {job.result["kernels"]["sdpa"] for job in setup.queue.jobs() if job.id != lost.id}
        assert again.result["kernels"]["sdpa"] < min(whole), "it went on behind its finished windows"
        assert "model" in setup.queue.jobs()[0].result["reused"], "models stay loaded"
        nodes.add()
        wait_until(lambda: workers.alive == 2, 300)
    setup.check_done()


def test_a_death_counts_and_a_worker_that_is_stuck_is_ended(setup: Setup, nodes: LocalCluster, monkeypatch) -> None:
    with workers_of(setup, nodes, count=1, retries=1, grace=1.0) as workers:
        setup.add(1)
        job = found(setup.runs)
        os.kill(place_of(workers, job.slot).process, signal.SIGKILL)
        wait_until(lambda: ended(setup.queue), 300)
        assert setup.queue.get(job.id).crashes == 1
        setup.check_done()

        setup.add(2, max_frames=None, frames=81)
        job = found(lambda: next((job for job in setup.queue.running() if job.progress.stage), None))
        os.kill(place_of(workers, job.slot).process, signal.SIGSTOP)
        setup.queue.cancel(job.id)
        wait_until(lambda: ended(setup.queue), 300)
        assert setup.queue.get(job.id).state == "cancelled"


def test_a_job_ends_when_it_is_to(setup: Setup, nodes: LocalCluster) -> None:
    """Cancelled, late, and with a sentence; the doctor answers from there."""
    with workers_of(setup, nodes, count=1) as workers:
        with pytest.raises(InfiniteTalkError, match="No worker lives"):
            workers.examine()
        setup.add(1)
        job = found(setup.runs)
        setup.queue.cancel(job.id)
        setup.add(2, limit=1e-3)
        setup.add(3, attention_mode="nothing")
        wait_until(lambda: ended(setup.queue), 300)
        cancelled, late, wrong = (setup.queue.get(f"{number:0>32}") for number in (1, 2, 3))
        assert cancelled.state == "cancelled"
        assert setup.folder.output("local", cancelled.id).partial.is_file(), "what is finished plays"
        assert (late.state, late.error) == ("failed", "The time limit of 0.001 s was over.")
        assert "attention mode 'nothing'" in wrong.error
        assert workers.restarts == 0
        assert workers.examine()["kernels"]


def test_jobs_survive_a_killed_service(setup: Setup, nodes: LocalCluster, tiny_set: TinySet) -> None:
    argv = [sys.executable, service_files.__file__, str(setup.folder.path), str(tiny_set.model.parent), "0"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for number in range(4):
        setup.add(number)
    service = subprocess.Popen([*argv, nodes.address], env=environment)
    try:
        found(setup.runs)
        service.kill()
        service.wait()
        begun = setup.queue.running()
        service = subprocess.Popen([*argv, nodes.address], env=environment)
        wait_until(lambda: ended(setup.queue), 300)
    finally:
        service.kill()
        service.wait()
    setup.check_done()
    assert begun
    assert {job.crashes for job in setup.queue.jobs()} == {0}


def test_a_machine_that_differs_is_not_used(setup: Setup, nodes: LocalCluster, monkeypatch, caplog) -> None:
    ours = cluster_module.versions()
    monkeypatch.setattr(cluster_module, "versions", lambda: ours | {"torch": "0.1"})
    with caplog.at_level(logging.WARNING), workers_of(setup, nodes, count=1) as workers:
        wait_until(lambda: "install the same on all machines" in caplog.text, 300)
        assert workers.alive == 0
    assert f"has torch {ours['torch']} (here 0.1)" in caplog.text


def test_a_storage_that_is_not_shared_is_found_out(setup: Setup, nodes: LocalCluster, caplog) -> None:
    """Each process has a memory of its own."""
    with caplog.at_level(logging.WARNING), workers_of(setup, nodes, count=1, storage="memory://jobs") as workers:
        wait_until(lambda: "all machines need to reach the same" in caplog.text, 300)
        assert workers.alive == 0


def test_gpus_that_the_cluster_does_not_have_are_a_sentence(setup: Setup) -> None:
    with (
        local_cluster(0) as empty,
        pytest.raises(InputError, match="has GPUs: start one that has, give --device cpu, or"),
        workers_of(setup, empty),
    ):
        pass


def test_an_address_where_no_cluster_is_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    begin = time.monotonic()
    for address in (f"127.0.0.1:{free}", "127.0.0.1:99999", "ray://127.0.0.1:10001", "local", ""):
        with pytest.raises(InputError, match="Ray cluster"):
            connect(address)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "cuda:1"}, "is one of a single machine"),
        ({"device": "auto", "gpus": 2}, "cannot ask for 2 GPUs"),
        ({"device": "auto", "gpus": -1}, "cannot ask for -1 GPUs"),
        ({"device": "cuda", "gpus": 0}, "cannot ask for 0 GPUs"),
        ({"count": 0}, "0 workers make no video"),
    ],
)
def test_what_workers_cannot_ask_for_is_rejected(setup: Setup, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ClusterWorkers(setup.folder, setup.base, "auto", **given)
