"""The plan of windows: every frame once, in order, whatever the lengths."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wanvideo_infinitetalk.pipeline.windows import audio_rows, latent_frames, plan_windows
from wanvideo_infinitetalk.wanvideo.errors import InputError

lengths = st.tuples(
    st.integers(1, 3000), st.integers(1, 40).map(lambda n: 4 * n + 1), st.integers(0, 39).map(lambda n: 4 * n + 1)
).filter(lambda case: case[2] < case[1])


@given(lengths)
@settings(deadline=None)
def test_every_frame_is_given_out_once_and_in_order(case) -> None:
    total, frames, motion = case
    plan = plan_windows(total, frames, motion)
    new = [range(w.start + w.overlap, w.start + w.overlap + w.new) for w in plan]
    assert [f for frames in new for f in frames] == list(range(total))


@given(lengths)
@settings(deadline=None)
def test_windows_follow_each_other(case) -> None:
    total, frames, motion = case
    plan = plan_windows(total, frames, motion)
    assert plan[0].start == 0
    assert plan[0].overlap == 0
    for before, window in itertools.pairwise(plan):
        assert window.start == before.end - motion
        assert window.overlap == motion
        assert before.new == before.frames - before.overlap  # only the last window is cut
    assert [w.index for w in plan] == list(range(len(plan)))
    assert [w.is_last for w in plan] == [False] * (len(plan) - 1) + [True]
    assert all(w.new >= 1 for w in plan)
    assert len(plan) == 1 or plan[-2].end < total <= plan[-1].end


@given(lengths)
@settings(deadline=None)
def test_windows_that_begin_early_give_out_every_frame_once(case) -> None:
    total, frames, motion = case
    plan = plan_windows(total, frames, motion, early=True)
    new = [range(w.start + motion, w.start + motion + w.new) for w in plan]
    assert [f for frames in new for f in frames] == list(range(total))
    assert plan[0].start == -motion
    assert all(w.overlap == motion and w.new >= 1 for w in plan)
    assert [w.is_last for w in plan] == [False] * (len(plan) - 1) + [True]


@given(lengths)
@settings(deadline=None)
def test_frames_take_their_own_rows(case) -> None:
    total, frames, motion = case
    for window in plan_windows(total, frames, motion):
        rows = audio_rows(window, total)
        assert len(rows) == frames
        for frame, taken in zip(range(window.start, window.end), rows, strict=True):
            assert len(taken) == 5
            assert all(0 <= r < total for r in taken)
            assert all(abs(a - b) <= 1 for a, b in itertools.pairwise(taken))  # never a jump
            if 2 <= frame < total - 2:
                assert taken == list(range(frame - 2, frame + 3))


def test_one_window_is_enough_when_it_covers_the_recording() -> None:
    assert len(plan_windows(81, 81, 9)) == 1
    assert len(plan_windows(82, 81, 9)) == 2
    assert plan_windows(5, 81, 9)[0].new == 5


def test_the_tail_is_heard_backwards() -> None:
    *_, last = plan_windows(15, 9, 5)
    assert last.start == 8
    # frames 8..16 of rows 0..14; 15 is 14 again, then 13, 12, 11
    assert audio_rows(last, 15)[-3:] == [[12, 13, 14, 14, 13], [13, 14, 14, 13, 12], [14, 14, 13, 12, 11]]


def test_a_recording_shorter_than_its_window_goes_to_and_fro() -> None:
    (only,) = plan_windows(2, 9, 5)
    assert [row[2] for row in audio_rows(only, 2)] == [0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert audio_rows(only, 2)[0] == [0, 0, 0, 1, 1]


def test_latent_frames() -> None:
    assert [latent_frames(n) for n in (1, 5, 9, 25, 81)] == [1, 2, 3, 7, 21]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((0, 81, 9), "shorter than one video frame"),
        ((10, 80, 9), r"window length of 80 frames .* set it to 81"),
        ((10, 81, 10), r"motion length of 10 frames .* set it to 9"),
        ((10, 81, 0), r"motion length of 0 frames .* set it to 1"),
        ((10, 9, 9), "leave no room"),
    ],
)
def test_lengths_that_make_no_plan(lengths, message) -> None:
    with pytest.raises(InputError, match=message):
        plan_windows(*lengths)
