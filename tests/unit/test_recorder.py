"""Windows are written in a thread of their own: in order, few at a time, none announced before it is on the disk."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wanvideo_infinitetalk.media.video import VideoFrames, VideoWriter
from wanvideo_infinitetalk.pipeline.journal import Journal, finished_windows
from wanvideo_infinitetalk.pipeline.long_video import FinishedWindow, RunState
from wanvideo_infinitetalk.pipeline.recorder import WAITING, Recorder
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError

WINDOWS = 5
SOON = 20.0
"""Seconds after which a wait has failed."""


def window(index: int) -> FinishedWindow:
    pixels = torch.full((2, 16, 16, 3), 40 * (index + 1), dtype=torch.uint8)
    carried, latents = torch.zeros(3, 1, 16, 16), torch.zeros(16, 1, 2, 2)
    state = RunState(index + 1, torch.Generator().get_state(), carried, None, latents)
    return FinishedWindow(index, WINDOWS, pixels, latents, state)


class Parts:
    """A writer and a journal in one that note what they are asked for; `before` is called with each window's index."""

    def __init__(self, before: Callable[[int], None] = lambda index: None) -> None:
        self.before = before
        self.seen: list[str] = []
        self.explained = nullcontext
        self.threads: set[int] = set()

    def append(self, frames: torch.Tensor) -> Any:
        index = int(frames[0, 0, 0, 0]) // 40 - 1
        self.threads.add(threading.get_ident())
        self.before(index)
        self.seen.append(f"frames {index}")

    def save(self, state: RunState, written: Any, kernels: Any) -> None:
        self.seen.append(f"entry {state.windows - 1}")

    def announce(self, done: int, windows: int) -> None:
        assert windows == WINDOWS
        assert f"entry {done - 1}" in self.seen
        assert threading.get_ident() not in self.threads
        self.seen.append(f"announced {done - 1}")

    def recorder(self, kernels: Counter[str] | None = None) -> Recorder:
        given: Any = self
        return Recorder(given, given, kernels or Counter(), self.announce)

    def of(self, kind: str) -> list[int]:
        return [int(line.split()[1]) for line in self.seen if line.startswith(kind)]


def test_windows_are_written_and_announced_in_order() -> None:
    parts = Parts()
    with parts.recorder() as recorder:
        for index in range(WINDOWS):
            recorder.add(window(index))
    for kind in ("frames", "entry", "announced"):
        assert parts.of(kind) == list(range(WINDOWS)), kind
    assert parts.threads.isdisjoint({threading.get_ident()})


def test_a_window_is_computed_while_the_one_before_is_written() -> None:
    computing = [threading.Event() for _ in range(WINDOWS + 1)]
    parts = Parts(lambda index: None if computing[index + 1].wait(SOON) else pytest.fail("the loop waited"))
    with parts.recorder() as recorder:
        for index in range(WINDOWS):
            computing[index].set()
            recorder.add(window(index))
        computing[WINDOWS].set()
    assert parts.of("frames") == list(range(WINDOWS))


def test_few_windows_wait() -> None:
    hold = threading.Event()
    parts = Parts(lambda index: None if hold.wait(SOON) else pytest.fail("never let go"))
    with parts.recorder() as recorder:
        for index in range(WAITING + 1):
            recorder.add(window(index))  # one is written, the others wait
        late = threading.Thread(target=lambda: recorder.add(window(WAITING + 1)))
        late.start()
        late.join(0.2)
        assert late.is_alive()  # nothing has been let go yet
        hold.set()
        late.join(SOON)
    assert parts.of("frames") == list(range(WAITING + 2))


def test_windows_are_announced_while_the_next_is_computed() -> None:
    parts = Parts()
    with parts.recorder() as recorder:
        recorder.add(window(0))
        recorder._pending[0][0].result(SOON)
        assert parts.of("announced") == []
        recorder.check()
        assert parts.of("announced") == [0]


def fail(index: int) -> None:
    if index == 1:
        raise InfiniteTalkError("No space.")


def told_by_add(recorder: Recorder) -> None:
    for index in range(2, WINDOWS):
        recorder.add(window(index))
    pytest.fail("not told")


def told_by_check(recorder: Recorder) -> None:
    wait([written for written, _, _ in recorder._pending], SOON)
    recorder.check()
    pytest.fail("not told")


def told_at_the_end(recorder: Recorder) -> None:
    pass


def interrupted(recorder: Recorder) -> None:
    raise KeyboardInterrupt


def failing(recorder: Recorder) -> None:
    raise InfiniteTalkError("The model failed.")


def run(parts: Parts, then: Callable[[Recorder], None]) -> None:
    """Two windows, and then something."""
    with parts.recorder() as recorder:
        recorder.add(window(0))
        recorder.add(window(1))
        then(recorder)


@pytest.mark.parametrize("then", [told_by_add, told_by_check, told_at_the_end])
def test_a_window_that_cannot_be_written_ends_the_run_and_is_followed_by_none(then) -> None:
    parts = Parts(fail)
    with pytest.raises(InfiniteTalkError, match="No space"):
        run(parts, then)
    assert parts.seen == ["frames 0", "entry 0", "announced 0"]


def test_what_was_finished_is_written_when_the_loop_is_interrupted() -> None:
    parts = Parts()
    with pytest.raises(KeyboardInterrupt):
        run(parts, interrupted)
    assert parts.of("announced") == [0, 1]


def test_an_interruption_while_a_window_is_handed_over_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    submit = ThreadPoolExecutor.submit

    def interrupt(*given: Any) -> None:
        submit(*given)
        raise KeyboardInterrupt

    def hand_over() -> None:
        with parts.recorder() as recorder:
            assert any(thread.name.startswith("recorder") for thread in threading.enumerate())  # started already
            monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupt)
            recorder.add(window(0))

    with pytest.raises(KeyboardInterrupt):
        hand_over()
    assert parts.seen == ["frames 0", "entry 0"]


def test_the_first_error_is_told_and_the_other_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(InfiniteTalkError, match="The model"):
        run(Parts(fail), failing)
    assert "No space" in caplog.text


def test_kernels_are_those_that_had_run_when_the_window_was_finished() -> None:
    kernels = Counter({"sdpa": 1})
    let = threading.Event()
    parts = Parts(lambda index: None if let.wait(SOON) else pytest.fail("never let go"))
    saved: list[Any] = []
    parts.save = lambda state, written, kernels: saved.append(sorted(kernels))  # type: ignore[method-assign]
    parts.announce = lambda done, windows: None  # type: ignore[method-assign]
    with parts.recorder(kernels) as recorder:
        recorder.add(window(0))
        kernels["eager"] += 1
        let.set()
    assert saved == [["sdpa"]]


def test_the_video_holds_the_windows(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "video.mp4", 25, crf=0)
    announced = []
    with writer, torch.inference_mode():
        journal = Journal(writer.files, {}, {})
        with Recorder(writer, journal, Counter(), lambda done, windows: announced.append(done)) as recorder:
            for index in range(WINDOWS):
                recorder.add(window(index))
                recorder.check()
        assert finished_windows(writer.files) == WINDOWS
    assert announced == [1, 2, 3, 4, 5]
    frames = VideoFrames(tmp_path / "video.mp4")
    means = [float(np.asarray(frames[index]).mean()) for index in range(len(frames))]
    assert np.allclose(means, [40 * (index // 2 + 1) for index in range(2 * WINDOWS)], atol=2)
