"""The storage between a service and workers elsewhere: whatever dies at any step, all that was handed over is kept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.service_files import FRAMES, WINDOWS, base_of, upload, write_inputs
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.video import OutputFiles, VideoFrames, VideoWriter
from wanvideo_infinitetalk.pipeline import journal as journal_module
from wanvideo_infinitetalk.pipeline import make_video
from wanvideo_infinitetalk.pipeline.journal import Journal, finished_windows
from wanvideo_infinitetalk.pipeline.loaded_models import LoadedModels
from wanvideo_infinitetalk.pipeline.long_video import RunState
from wanvideo_infinitetalk.service import storage as storage_module
from wanvideo_infinitetalk.service.folder import ServiceFolder, new_id
from wanvideo_infinitetalk.service.queue import Progress, Record
from wanvideo_infinitetalk.service.storage import Attempt, Storage, StorageError, make_elsewhere
from wanvideo_infinitetalk.service.worker import End
from wanvideo_infinitetalk.wanvideo.errors import InputError

ID = f"{1:0>32}"
MADE = 4
"""Windows of a job in these tests, of two frames each."""


class Death(BaseException):
    """Of a process, in a test."""


class Deaths:
    """Lets a process die at its step number `last` of those that are `watched`; a write is half done then."""

    def __init__(self, last: int) -> None:
        self.last, self.steps, self.done = last, 0, []
        self._inside = False

    def watched(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def dies(*given: Any, **more: Any) -> Any:
            if self._inside:  # a step of which another one consists
                return step(*given, **more)
            self.steps += 1
            if self.steps == self.last:
                if name == "pipe_file":
                    step(given[0], given[1][: len(given[1]) // 2])
                raise Death
            self._inside = True
            result = step(*given, **more)
            self._inside = False
            self.done.append((name, given))
            return result

        return dies

    def handed_over(self) -> int:
        """Windows whose journal has got its name."""
        return sum(name == "mv" and str(given[1]).endswith(".journal") for name, given in self.done)


STEPS = ("pipe_file", "mv", "put_file", "get_file", "cat_file", "rm")


@dataclass
class Service:
    """The service's folder with a job, and a storage."""

    folder: ServiceFolder
    url: str
    record: Record

    @property
    def output(self) -> OutputFiles:
        return self.folder.output("local", self.record.id)

    def attempt(self) -> Attempt:
        return Storage(self.url).attempt(self.record)

    def again(self) -> None:
        """The job is queued and claimed once more."""
        self.record = replace(self.record, started=self.record.started + 1)

    def left(self) -> list[str]:
        """What is in the storage."""
        return Storage(self.url).names()


def record_of(request: dict[str, Any]) -> Record:
    return Record(1, ID, "local", request, 0, None, "running", 0, 1.5, None, 0, 0, False, None, Progress(), {})


@pytest.fixture(params=["file", "memory"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    folder = ServiceFolder.make(tmp_path / "service")
    url = str(tmp_path / "storage") if request.param == "file" else f"memory://{new_id()}"
    return Service(folder, url, record_of(upload(folder, write_inputs(tmp_path))))


def frames_of(window: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.manual_seed(10 * seed + window))


def write(output: OutputFiles, seed: int, after: Callable[[], None], windows: int = MADE) -> int:
    """Make a video as `make_video` does, or its first windows; returns how many were there."""
    journal = Journal(output, {"seed": str(seed)}, {})
    try:
        start = journal.start(True)
    except InputError:  # of another seed
        start = None
    begin, written = (0, None) if start is None else (start.state.windows, start.written)
    writer = VideoWriter(output.video, written=written)
    for window in range(begin, windows):
        written = writer.append(frames_of(window, seed))
        state = RunState(window + 1, torch.zeros(1), torch.zeros(1), None, torch.zeros(1))
        journal.save(state, written, ())
        after()
    if windows == MADE:
        writer.close()
    return begin


def work(service: Service, there: Path, deaths: Deaths, monkeypatch: pytest.MonkeyPatch, anew: bool = False) -> int:
    """What a worker does, on a machine of its own; returns the windows that it went on behind."""
    attempt = service.attempt()
    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(attempt.storage.files, name, deaths.watched(name, getattr(attempt.storage.files, name)))
        folder = ServiceFolder.make(there)
        attempt.fetch(folder, service.record)
        output = folder.output("local", ID)
        if anew:
            attempt.anew()
        begin = write(output, 1, lambda: attempt.send(output))
        attempt.send_video(output)
    return begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The video of a run that nothing disturbs."""
    output = OutputFiles.of(tmp_path_factory.mktemp("whole") / "video.mp4")
    write(output, 1, lambda: None)
    return output.video.read_bytes()


def check_every_death(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes, seed: int
) -> None:
    """A worker dies at each of its steps in turn; the next one goes on behind what was handed over.

    Args:
        seed: of the two windows that are there before; other than 1: they are replaced.
    """
    for last in itertools.count(1):
        output = service.output
        output.video.parent.mkdir(parents=True)
        write(output, seed, lambda: None, windows=2)
        service.attempt().give(service.folder, service.record)
        deaths = Deaths(last)
        try:
            work(service, tmp_path / f"first {last}", deaths, monkeypatch, anew=seed != 1)
        except Death:
            died = True
        else:
            died = False
        service.attempt().take(output)
        new = deaths.handed_over()
        assert finished_windows(output) == (new if seed != 1 and new else 2 + new)

        service.again()
        anew = seed != 1 and not new
        service.attempt().give(service.folder, service.record)
        begin = work(service, tmp_path / f"second {last}", Deaths(0), monkeypatch, anew)
        assert begin == (0 if anew else finished_windows(output)), "what was handed over is not made again"
        attempt = service.attempt()
        attempt.take(output)
        attempt.take_video(output)
        attempt.remove()
        assert output.video.read_bytes() == whole
        assert [path.name for path in output.video.parent.iterdir()] == ["video.mp4"]
        assert service.left() == []
        output.video.unlink()
        output.video.parent.rmdir()
        if not died:
            assert deaths.steps > 12
            return


def test_a_worker_can_die_at_each_step(service: Service, tmp_path: Path, monkeypatch, whole: bytes) -> None:
    check_every_death(service, tmp_path, monkeypatch, whole, seed=1)


def test_a_worker_that_begins_anew_can_die_at_each_step(service: Service, tmp_path: Path, monkeypatch, whole) -> None:
    check_every_death(service, tmp_path, monkeypatch, whole, seed=2)


@pytest.mark.parametrize("anew", [False, True])
def test_the_service_can_die_at_each_step_of_taking(service: Service, tmp_path: Path, monkeypatch, anew: bool) -> None:
    """The next call takes all, whatever an earlier one has left half taken."""
    for last in itertools.count(1):
        output = service.output
        output.video.parent.mkdir(parents=True, exist_ok=True)
        write(output, 2 if anew else 1, lambda: None, windows=1)
        service.attempt().give(service.folder, service.record)
        attempt, folder = service.attempt(), ServiceFolder.make(tmp_path / f"worker {last}")
        attempt.fetch(folder, service.record)
        if anew:
            attempt.anew()
        there = folder.output("local", ID)
        write(there, 1, lambda attempt=attempt, there=there: attempt.send(there), windows=3)

        deaths, taking = Deaths(last), service.attempt()
        with monkeypatch.context() as patch:
            patch.setattr(taking.storage.files, "cat_file", deaths.watched("cat_file", taking.storage.files.cat_file))
            patch.setattr(OutputFiles, "add", deaths.watched("add", OutputFiles.add))
            patch.setattr(storage_module, "replace_file", deaths.watched("replace", storage_module.replace_file))
            try:
                taking.take(output)
            except Death:
                died = True
            else:
                died = False
        service.attempt().take(output)
        assert finished_windows(output) == 3
        assert output.partial.read_bytes() == there.partial.read_bytes()
        service.attempt().remove()
        service.again()
        output.remove_unfinished()
        if not died:
            assert deaths.steps > 3
            return


def test_a_worker_that_was_given_up_disturbs_no_other(service: Service, tmp_path: Path, monkeypatch) -> None:
    """It is cut off, not dead, and hands its windows over beside the next one."""
    service.attempt().give(service.folder, service.record)
    lost, folder = service.attempt(), ServiceFolder.make(tmp_path / "lost")
    lost.fetch(folder, service.record)
    there = folder.output("local", ID)
    service.again()
    service.attempt().give(service.folder, service.record)
    begin = work(service, tmp_path / "next", Deaths(0), monkeypatch)
    write(there, 7, lambda: lost.send(there), windows=2)
    assert begin == 0
    attempt = service.attempt()
    attempt.take(service.output)
    assert finished_windows(service.output) == MADE
    attempt.remove()
    assert service.left() == []


def test_what_is_not_handed_over_goes_with_the_next_window(service: Service, tmp_path: Path, monkeypatch) -> None:
    service.attempt().give(service.folder, service.record)
    attempt, folder = service.attempt(), ServiceFolder.make(tmp_path / "worker")
    attempt.fetch(folder, service.record)
    there, calls = folder.output("local", ID), itertools.count(1)

    def send() -> None:
        if next(calls) != 2:
            attempt.send(there)
            return
        with monkeypatch.context() as patch:
            patch.setattr(attempt.storage.files, "mv", raising(OSError("away")))
            with pytest.raises(StorageError, match=r"failed \(OSError: away\)"):
                attempt.send(there)

    write(there, 1, send, windows=3)
    service.attempt().take(service.output)
    assert finished_windows(service.output) == 3
    assert service.output.partial.read_bytes() == there.partial.read_bytes()


def raising(error: Exception) -> Callable[..., Any]:
    def call(*given: Any, **more: Any) -> Any:
        raise error

    return call


# ------------------------------------------------------------------------------------------------------ with the models


@dataclass
class Elsewhere:
    """A job that is made on another machine, in this process."""

    service: Service
    base: dict[str, Any]

    def make(self, end: Callable[[Progress], End | None] = lambda progress: None) -> tuple[End, list[int]]:
        """How it ends, and the windows that it makes. `end`: how it is to end."""
        made, generate = [], make_video.generate_windows

        def noted(*given: Any, **more: Any) -> Any:
            for window in generate(*given, **more):
                made.append(window.index)
                yield window

        now = [Progress()]
        self.service.attempt().give(self.service.folder, self.service.record)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make_video, "generate_windows", noted)
            ended = make_elsewhere(
                self.service.record,
                self.service.attempt(),
                self.base,
                lambda progress: now.__setitem__(0, progress),
                lambda: end(now[0]),
                LoadedModels(),
                str(self.service.folder.path),
            )
        self.service.attempt().take(self.service.output)
        return ended, made


@pytest.fixture
def elsewhere(tiny_set: TinySet, tmp_path: Path) -> Elsewhere:
    folder = ServiceFolder.make(tmp_path / "service")
    request = upload(folder, write_inputs(tmp_path))
    return Elsewhere(Service(folder, str(tmp_path / "storage"), record_of(request)), base_of(tiny_set))


def test_a_job_goes_on_on_another_machine(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are known by their time, as large ones are, are the same ones there."""
    monkeypatch.setattr(journal_module, "WHOLE", 0)
    cancelled = End("cancelled")
    ended, made = elsewhere.make(lambda progress: cancelled if progress.windows_done else None)
    assert ended == cancelled
    before = finished_windows(elsewhere.service.output)
    assert 1 <= before < WINDOWS
    elsewhere.service.again()
    ended, made = elsewhere.make()
    assert (ended.state, ended.result["frames"]) == ("done", FRAMES)
    assert made[0] == before
    elsewhere.service.attempt().take_video(elsewhere.service.output)
    assert len(VideoFrames(elsewhere.service.output.video)) == FRAMES


def test_finished_windows_of_other_settings_are_replaced(elsewhere: Elsewhere) -> None:
    elsewhere.make(lambda progress: End("cancelled") if progress.windows_done else None)
    elsewhere.service.again()
    elsewhere.base["seed"] = 7
    ended, made = elsewhere.make()
    assert ended.state == "done"
    assert made == list(range(WINDOWS))
    assert finished_windows(elsewhere.service.output) == WINDOWS


def test_a_storage_that_fails_for_a_moment_ends_no_job(elsewhere: Elsewhere, monkeypatch, caplog) -> None:
    send = Attempt.send
    calls = itertools.count()
    monkeypatch.setattr(
        Attempt, "send", lambda *given: raising(StorageError("Away."))() if next(calls) == 0 else send(*given)
    )
    with caplog.at_level(logging.WARNING):
        assert elsewhere.make()[0].state == "done"
    assert "Away. It is tried again" in caplog.text
    assert finished_windows(elsewhere.service.output) == WINDOWS


def test_sentences_name_the_folder_of_the_service(elsewhere: Elsewhere) -> None:
    """From which the API takes it away; that of the worker would stay."""
    image = elsewhere.service.folder.upload("local", "image", elsewhere.service.record.request["image"])
    image.write_bytes(b"no image")
    ended, _ = elsewhere.make()
    assert ended.state == "failed"
    assert str(image) in ended.error
    image.unlink()
    elsewhere.service.again()
    ended, _ = elsewhere.make()
    assert ended.state == "failed"
    assert str(image) in ended.error


def test_a_machine_without_the_models_says_so(elsewhere: Elsewhere, tmp_path: Path) -> None:
    missing = tmp_path / "elsewhere.safetensors"
    elsewhere.base["files"] = replace(elsewhere.base["files"], model=missing)
    ended, made = elsewhere.make()
    assert ended.state == "failed"
    assert f"lacks {missing}: model files need the same paths on all machines." in ended.error
    assert made == []


def test_a_storage_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="The storage nothing://there cannot be used"):
        Storage("nothing://there")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Give another folder"), Storage(str(tmp_path / "file")).marked():
        pass


def test_a_mark_is_seen_in_the_same_storage_alone(tmp_path: Path) -> None:
    with Storage(str(tmp_path / "one")).marked() as mark:
        assert mark in Storage(str(tmp_path / "one")).names()
        assert mark not in Storage(str(tmp_path / "two")).names()
    assert Storage(str(tmp_path / "one")).names() == []
