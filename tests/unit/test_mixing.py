"""Several recordings on one time line, and what is done to their sound."""

from __future__ import annotations

import numpy as np
import pytest
from wanvideo_infinitetalk.media.mixing import add_noise_floor, arrange, mix, smooth_transients
from wanvideo_infinitetalk.wanvideo.errors import InputError

RATE = 16_000


def tone(seconds: float, hertz: float = 220.0, level: float = 0.3) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def test_together_they_begin_at_once() -> None:
    long, short = tone(1.0), tone(0.4)
    first, second = arrange([long, short], one_after_the_other=False)
    assert np.array_equal(first, long)
    assert len(second) == len(long)
    assert np.array_equal(second[: len(short)], short)
    assert not second[len(short) :].any()


def test_one_after_the_other_each_is_silent_while_the_others_speak() -> None:
    parts = [tone(0.2, 200), tone(0.3, 300), tone(0.1, 400)]
    lines = arrange(parts, one_after_the_other=True)
    assert {len(line) for line in lines} == {sum(map(len, parts))}
    start = 0
    for line, part in zip(lines, parts, strict=True):
        assert np.array_equal(line[start : start + len(part)], part)
        assert not line[:start].any()
        assert not line[start + len(part) :].any()
        start += len(part)


def test_nobody_is_rejected() -> None:
    with pytest.raises(InputError, match="connect at least one"):
        arrange([], one_after_the_other=False)


def test_the_mix_is_the_sum_and_never_clips() -> None:
    quiet = mix([tone(0.1, level=0.2), tone(0.1, level=0.3)])
    np.testing.assert_allclose(quiet, tone(0.1, level=0.5), atol=1e-6)
    loud = mix([tone(0.1, level=0.9), tone(0.1, level=0.9)])
    assert np.abs(loud).max() == pytest.approx(1.0)
    assert loud.dtype == np.float32


def test_the_noise_floor_is_faint_and_always_the_same() -> None:
    silence = np.zeros(RATE, dtype=np.float32)
    noisy = add_noise_floor(silence)
    assert 20 * np.log10(noisy.std()) == pytest.approx(-60, abs=0.5)
    assert np.array_equal(noisy, add_noise_floor(silence))
    assert not silence.any()


def test_a_click_is_taken_out_and_the_rest_stays() -> None:
    speech = tone(0.5)
    clicked = speech.copy()
    clicked[4000] = 0.95
    smooth = smooth_transients(clicked, RATE)
    assert abs(smooth[4000] - speech[4000]) < 0.1
    far = np.r_[0:3900, 4100 : len(speech)]
    assert np.array_equal(smooth[far], speech[far])
    assert np.array_equal(smooth_transients(speech, RATE), speech)
    assert clicked[4000] == np.float32(0.95)
