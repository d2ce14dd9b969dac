"""The queue: one state machine, whose changes are guarded, and which outlives its processes."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from wanvideo_infinitetalk.service.queue import ENDED, STATES, Progress, Queue
from wanvideo_infinitetalk.wanvideo.errors import InputError


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "jobs.sqlite")
    yield queue
    queue.close()


def test_jobs_run_by_priority_then_in_their_order(queue: Queue) -> None:
    for id, priority in (("a", 0), ("b", 0), ("c", 5), ("d", -1), ("e", 5)):
        queue.add(id, "local", {}, priority)
    assert queue.ahead(queue.get("a")) == 2
    order = [queue.claim(slot).id for slot in range(5)]
    assert order == ["c", "e", "a", "b", "d"]
    assert queue.claim(5) is None


def test_a_worker_runs_one_job_at_a_time(queue: Queue) -> None:
    queue.add("a", "local", {})
    queue.add("b", "local", {})
    assert queue.claim(0).id == "a"
    assert queue.claim(0) is None
    assert queue.claim(1).id == "b"


def test_what_was_accepted_is_read_back_by_another_process(queue: Queue) -> None:
    queue.add("a", "one", {"prompt": "ein Gesicht – 脸"}, 3, 60)
    other = Queue(queue.path)
    record = other.get("a")
    assert (record.request, record.priority, record.time_limit) == ({"prompt": "ein Gesicht – 脸"}, 3, 60)
    assert [job.id for job in other.jobs("one")] == ["a"]
    assert other.jobs("two") == []
    other.close()


def test_no_change_leaves_another_state_than_the_machine_says(queue: Queue) -> None:
    """Every change in every state: what is reached is an arrow of the module's header."""
    arrows = {("queued", "running"), ("queued", "cancelled"), ("running", "queued")}
    arrows |= {("running", end) for end in ENDED}
    seen = set()
    rng = random.Random(0)
    for number in range(40):
        queue.add(str(number), "local", {})
    changes = (
        lambda id: queue.claim(rng.randrange(2)),
        lambda id: queue.cancel(id),
        lambda id: [queue.end(job.id, rng.randrange(2), rng.choice(ENDED)) for job in queue.running()],
        lambda id: queue.report(id, rng.randrange(2), Progress("Generating")),
        lambda id: queue.release(rng.randrange(2), crashed=rng.random() < 0.5),
    )
    for _ in range(300):
        before = {job.id: job.state for job in queue.jobs()}
        rng.choice(changes)(str(rng.randrange(40)))
        for job in queue.jobs():
            if job.state != before[job.id]:
                seen.add((before[job.id], job.state))
            assert (job.slot is not None) == (job.state == "running")
            assert (job.ended is not None) == (job.state in ENDED)
    assert seen == arrows


def test_a_job_is_claimed_once_by_many(queue: Queue) -> None:
    for number in range(60):
        queue.add(str(number), "local", {})
    claimed: list[str] = []

    def claim(slot: int) -> None:
        own = Queue(queue.path)
        while (job := own.claim(slot)) is not None:
            claimed.append(job.id)
            own.end(job.id, slot, "done")
        own.close()

    threads = [threading.Thread(target=claim, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed, key=int) == [str(number) for number in range(60)]
    assert queue.counts() == dict.fromkeys(STATES, 0) | {"done": 60}


def test_only_the_worker_that_runs_a_job_ends_it(queue: Queue) -> None:
    queue.add("a", "local", {})
    assert not queue.end("a", 0, "done")
    queue.claim(1)
    assert not queue.end("a", 0, "done")
    queue.release(1, crashed=False)
    assert not queue.end("a", 1, "done")
    assert queue.get("a").state == "queued"


def test_a_dead_worker_gives_its_job_back_in_its_old_place_and_once(queue: Queue) -> None:
    queue.add("a", "local", {})
    queue.add("b", "local", {})
    for _ in range(5):  # the service's deaths are not the job's
        assert queue.claim(0).id == "a"
        assert queue.release(0, crashed=False).state == "queued"
    queue.claim(0)
    assert queue.release(0, crashed=True).crashes == 1
    assert queue.claim(0).id == "a"
    failed = queue.release(0, crashed=True)
    assert (failed.state, failed.error) == ("failed", "Its worker died 2 times; the log of the service says more.")
    assert queue.release(0, crashed=True) is None


def test_cancelling_and_late_jobs_of_a_dead_worker_end(queue: Queue) -> None:
    queue.add("a", "local", {})
    queue.add("b", "local", {}, 0, 1e-9)
    queue.claim(0)
    assert queue.cancel("a").state == "running"
    assert queue.release(0, crashed=True).state == "cancelled"
    assert queue.claim(0).late
    assert queue.release(0, crashed=True).error == "The time limit of 1e-09 s was over."


def test_cancelling_leaves_ended_jobs_as_they_are(queue: Queue) -> None:
    queue.add("a", "local", {})
    done = queue.claim(0)
    queue.end("a", 0, "done", result={"frames": 5})
    assert queue.cancel("a") == replace(queue.get("a"), state="done", cancelling=False)
    assert queue.get("a").result == {"frames": 5}
    assert done.number == 1
    with pytest.raises(KeyError):
        queue.cancel("b")


def test_a_file_that_is_no_queue_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but more than a few words of text")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE jobs (name TEXT)")
    other.close()
    for name in ("text", "other", "."):
        with pytest.raises(InputError, match="cannot be used as a queue"):
            Queue(tmp_path / name)
