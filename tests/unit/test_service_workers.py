"""Workers: jobs are made exactly once, in order, whatever dies; they end when they are to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import service_files
from support.service_files import FRAMES, WINDOWS, base_of, ended, upload, wait_until, write_inputs
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import OutputFiles, VideoFrames
from wanvideo_infinitetalk.pipeline import make_video
from wanvideo_infinitetalk.pipeline.loaded_models import LoadedModels
from wanvideo_infinitetalk.service import worker
from wanvideo_infinitetalk.service.folder import ServiceFolder
from wanvideo_infinitetalk.service.queue import Queue, Record
from wanvideo_infinitetalk.service.workers import Workers
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError


@dataclass(frozen=True)
class Setup:
    """A service's folder, its queue, and a request for it."""

    folder: ServiceFolder
    queue: Queue
    base: dict
    request: dict

    def add(self, id: str, **more) -> Record:
        limit = more.pop("time_limit", None)
        return self.queue.add(f"{id:0>32}", "local", self.request | more, 0, limit)

    def run_next(self, loaded: LoadedModels | None = None) -> Record:
        """Make the next job in this process."""
        record = self.queue.claim(0)
        worker.run(self.queue, record, 0, self.folder, self.base, loaded or LoadedModels())
        return self.queue.get(record.id)

    def files_of(self, record: Record) -> list[str]:
        return sorted(path.name for path in self.folder.output("local", record.id).video.parent.iterdir())


@pytest.fixture
def setup(tiny_set: TinySet, tmp_path: Path) -> Setup:
    folder = ServiceFolder.make(tmp_path / "service")
    return Setup(folder, folder.queue(), base_of(tiny_set), upload(folder, write_inputs(tmp_path)))


def test_a_job_tells_how_far_it_is_and_what_it_made(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    report = Queue.report
    monkeypatch.setattr(Queue, "report", lambda self, id, slot, now: (told.append(now), report(self, id, slot, now)))
    setup.add("1")
    done = setup.run_next()
    assert (done.state, done.error, done.crashes) == ("done", None, 0)
    assert done.result["frames"] == FRAMES == len(VideoFrames(setup.folder.output("local", done.id).video))
    assert setup.files_of(done) == ["video.mp4"]
    assert [now.windows_done for now in told if now.windows_done] == [1, 2, WINDOWS]
    assert "Generating" in [now.stage for now in told]


def test_models_stay_loaded_where_nothing_changed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same video, without the files being read again; a changed setting lets go of what it decides alone."""
    loads = []
    for name in ("_load_model", "_load_vae", "_encode_prompts"):
        load = getattr(make_video, name)
        monkeypatch.setattr(make_video, name, lambda *given, of=name, load=load: (loads.append(of), load(*given))[1])
    loaded = LoadedModels()
    setup.add("1")
    setup.add("2")
    setup.add("3", prompt="another one")
    setup.add("4", quantization="fp8_e4m3fn")
    reused, pixels = [], []
    for _ in range(4):
        record = setup.run_next(loaded)
        reused.append(record.result["reused"])
        frames = VideoFrames(setup.folder.output("local", record.id).video)
        pixels.append(frames[FRAMES - 1].tobytes())
    assert reused == [
        [],
        ["VAE", "image encoder", "model", "prompts"],
        ["VAE", "image encoder", "model"],
        ["VAE", "image encoder"],
    ]
    assert loads == ["_encode_prompts", "_load_vae", "_load_model", "_encode_prompts", "_encode_prompts", "_load_model"]
    assert pixels[0] == pixels[1]


def test_what_a_user_can_cause_ends_the_job_with_a_sentence(setup: Setup) -> None:
    setup.add("1", attention_mode="nothing")
    failed = setup.run_next()
    assert failed.state == "failed"
    assert "attention mode 'nothing'" in failed.error
    setup.add("2", preset="of an earlier version")
    assert "There is no preset" in setup.run_next().error
    setup.add("3")
    assert setup.run_next().state == "done"


def test_a_video_that_is_there_is_not_made_again(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker died between the last step and the word of it."""
    setup.add("1")
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "end", lambda *given, **more: False)
        assert setup.run_next().state == "running"
    setup.queue.release(0, crashed=True)
    monkeypatch.setattr(worker, "make_video", None)
    done = setup.run_next()
    assert (done.state, done.result) == ("done", {"frames": FRAMES, "width": 32, "height": 32})


@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_what_stands_next_to_a_whole_video_goes_with_a_death(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """Its worker died while it removed what is not needed any more: before each of the files in turn."""
    setup.add("1")

    class Death(BaseException):
        pass

    def dies(files: OutputFiles) -> None:
        for path in (files.temporary, files.journal, files.partial)[:removed]:
            path.unlink(missing_ok=True)
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(OutputFiles, "remove_unfinished", dies)
        with pytest.raises(Death):
            setup.run_next()
    files = setup.folder.output("local", f"{1:0>32}")
    assert files.video.exists()
    assert files.partial.exists() == (removed < 3)
    files.lock.touch()
    setup.queue.release(0, crashed=True)
    monkeypatch.setattr(worker, "make_video", None)
    done = setup.run_next()
    assert done.state == "done"
    assert setup.files_of(done) == ["video.mp4"]


def test_a_job_goes_on_behind_its_last_window(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    made, generate = [], make_video.generate_windows

    def noted(*given, **more):
        for window in generate(*given, **more):
            made.append(window.index)
            yield window

    monkeypatch.setattr(make_video, "generate_windows", noted)
    setup.add("1")
    with monkeypatch.context() as patch:
        patch.setattr(worker.Follower, "_note", fail_behind(2))
        with pytest.raises(ZeroDivisionError):
            setup.run_next()
    setup.queue.release(0, crashed=True)
    assert setup.run_next().state == "done"
    assert made.count(0) == made.count(1) == 1, "finished windows are kept"
    assert made[-1] == WINDOWS - 1


def fail_behind(windows: int):
    """A `Follower._note` as of a process that dies when so many windows are in the file."""

    def note(self, **changes) -> None:
        if changes.get("windows_done") == windows:
            raise ZeroDivisionError

    return note


def test_finished_windows_of_other_settings_are_made_anew(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service was started with other models in between."""
    setup.add("1")
    with monkeypatch.context() as patch:
        patch.setattr(worker.Follower, "_note", fail_behind(2))
        with pytest.raises(ZeroDivisionError):
            setup.run_next()
    setup.queue.release(0, crashed=True)
    setup.base["seed"] = 7
    assert setup.run_next().state == "done"


def test_a_job_that_fails_beside_loaded_models_is_tried_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, calls = LoadedModels(), []
    setup.add("1")
    setup.run_next(loaded)

    def crowded(job, events, loaded):
        calls.append(loaded.names)
        if loaded.names:
            loaded.reused = loaded.names
            raise InfiniteTalkError("The memory of cuda does not suffice.")
        return make_video.make_video(job, events, loaded)

    monkeypatch.setattr(worker, "make_video", crowded)
    setup.add("2")
    assert setup.run_next(loaded).state == "done"
    assert [len(names) for names in calls] == [4, 0]


@pytest.mark.parametrize(
    ("change", "state", "error"), [("cancel", "cancelled", None), ("late", "failed", "time limit")]
)
def test_a_running_job_ends_when_it_is_to(
    setup: Setup, monkeypatch, change: str, state: str, error: str | None
) -> None:
    monkeypatch.setattr(worker, "IDLE", 0)
    setup.add("1", time_limit=1e-3 if change == "late" else None)
    report = Queue.report

    def cancelling(self: Queue, id: str, slot: int, progress) -> None:
        report(self, id, slot, progress)
        if change == "cancel" and progress.windows_done == 1:
            self.cancel(id)

    monkeypatch.setattr(Queue, "report", cancelling)
    record = setup.run_next()
    assert record.state == state
    assert (error or "") in (record.error or "")
    if change == "cancel":
        assert setup.files_of(record) == ["video.partial.mp4", "video.partial.safetensors"], "what is finished plays"


def test_a_worker_that_is_stuck_is_ended(setup: Setup) -> None:
    """Its job is cancelled, and it has not answered: here, because nothing runs in it."""
    with Workers(setup.folder, setup.base, ["cpu"], grace=0.1) as workers:
        first = workers._slots[0].process
        os.kill(first.pid, signal.SIGSTOP)
        setup.add("1")
        setup.queue.claim(0)
        setup.queue.cancel(f"{1:0>32}")
        wait_until(lambda: ended(setup.queue))
        assert setup.queue.get(f"{1:0>32}").state == "cancelled"
        assert not first.is_alive()
        with pytest.raises(InputError, match="Another service uses"), Workers(setup.folder, setup.base, ["cpu"]):
            pass


@dataclass
class Service:
    """A service in a process of its own, which can be killed."""

    setup: Setup
    models: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        argv = [sys.executable, service_files.__file__, str(self.setup.folder.path), str(self.models), "1000"]
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def kill_worker(self) -> bool:
        """Whether there was one to kill."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        return bool(workers)


def check_jobs_survive_kills(setup: Setup, models: Path, jobs: int, kills: list[str], seed: int) -> None:
    """Each job ends done, once, and in its order, and leaves one whole video, although things die at random moments."""
    rng = random.Random(seed)
    records = [setup.add(f"{number:x}", seed=number) for number in range(1, jobs + 1)]
    service = Service(setup, models)
    service.start()
    try:
        for number, what in enumerate(kills, 1):
            due = jobs * number // (len(kills) + 1)
            wait_until(lambda due=due: setup.queue.counts()["done"] >= due and setup.queue.running(), 300)
            time.sleep(rng.uniform(0, 0.6))
            if what == "service":
                service.kill()
                service.start()
            else:
                assert service.kill_worker()
        wait_until(lambda: ended(setup.queue), 600)
    finally:
        service.kill()
    after = [setup.queue.get(record.id) for record in records]
    assert [job.state for job in after] == ["done"] * jobs
    assert [job.ended for job in after] == sorted(job.ended for job in after), "in their order"
    for job in after:
        assert setup.files_of(job) == ["video.mp4"]
        assert len(VideoFrames(setup.folder.output("local", job.id).video)) == FRAMES


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker's process in /proc")


@needs_proc
def test_jobs_survive_a_killed_worker_and_a_killed_service(setup: Setup, tiny_set: TinySet) -> None:
    check_jobs_survive_kills(setup, tiny_set.model.parent, 6, ["worker", "service"], seed=0)


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_jobs_survive_kills(setup: Setup, tiny_set: TinySet) -> None:
    kills = random.Random(1).choices(["worker", "service"], k=20)
    check_jobs_survive_kills(setup, tiny_set.model.parent, 200, kills, seed=1)
