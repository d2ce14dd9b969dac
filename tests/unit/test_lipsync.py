"""The measure of lip-sync, on videos whose truth is known because they are drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.benchmarks.lipsync import (
    allowed_loss,
    border_excess,
    border_jumps,
    correlation,
    identity,
    lag,
    openings,
    read_video,
    silence,
)
from wanvideo_infinitetalk.tools.demo_model.faces import draw, mouth_boxes, random_faces, random_motion, rest
from wanvideo_infinitetalk.tools.demo_model.rule import FPS, SAMPLE_RATE, mouth_of

SIZE = 64
FRAMES = 75


def babble(seconds: float, seed: int) -> np.ndarray:
    """Something like speech at 16 kHz: a buzz whose loudness comes and goes, with pauses."""
    rng = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    points = np.arange(0, count + 4000, 2400)
    loud = np.interp(np.arange(count), points, rng.uniform(-45, 0, len(points)) * (rng.random(len(points)) < 0.8))
    loud[: SAMPLE_RATE // 3] = -90
    t = np.arange(count) / SAMPLE_RATE
    buzz = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 12))
    return (0.2 * buzz * 10 ** (loud / 20)).astype(np.float32)


def drawn(speech: list[np.ndarray], seed: int, late: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(video [3, F, H, W], image, boxes) of faces whose mouths follow `speech`, `late` frames behind."""
    generator = torch.Generator().manual_seed(seed)
    middles = [0.0] if len(speech) == 1 else [-1.0, 1.0]
    faces = [random_faces(1, generator, middle) for middle in middles]
    motions = []
    for wave in speech:
        mouth = mouth_of(wave, FRAMES)
        opening, width = (torch.from_numpy(np.roll(x, late))[None] for x in (mouth.opening, mouth.width))
        motions.append(random_motion(opening, width, generator, still_start=True))
    size = SIZE, SIZE * len(speech)
    video = draw(faces, motions, *size)[0]
    image = draw(faces, [rest(1) for _ in faces], *size)[0, :, 0]
    return video, image, torch.cat([mouth_boxes(face, *size) for face in faces])


@pytest.mark.parametrize("seed", range(8))
def test_drawn_mouths_are_read_whatever_the_face(seed: int) -> None:
    speech = babble(FRAMES / FPS, seed)
    video, image, boxes = drawn([speech], seed)
    (reading,) = read_video(video, image, boxes, [speech], FRAMES, 9)
    assert reading.correlation > 0.96
    assert reading.lag == 0
    assert reading.silence < 0.1
    assert reading.identity > 22  # a drawn head turns and blinks; the image does not
    assert not reading.jumps  # one window has no border


@pytest.mark.parametrize("late", [-4, 3])
def test_a_late_mouth_is_found_late(late: int) -> None:
    speech = babble(FRAMES / FPS, 3)
    video, _, boxes = drawn([speech], 3, late)
    assert lag(openings(video[None], boxes[None])[0, 0], torch.from_numpy(mouth_of(speech, FRAMES).opening)) == late


def test_a_mouth_that_does_not_move_follows_nothing() -> None:
    speech = babble(FRAMES / FPS, 4)
    _, image, boxes = drawn([speech], 4)
    still = image[:, None].expand(-1, FRAMES, -1, -1)
    (reading,) = read_video(still, image, boxes, [speech], FRAMES, 9)
    assert abs(reading.correlation) < 0.01
    assert reading.identity > 60


def test_each_of_two_mouths_follows_its_own_recording() -> None:
    speech = [babble(FRAMES / FPS, 5), babble(FRAMES / FPS, 6)]
    video, image, boxes = drawn(speech, 5)
    own = read_video(video, image, boxes, speech, FRAMES, 9)
    other = read_video(video, image, boxes, speech[::-1], FRAMES, 9)
    assert min(one.correlation for one in own) > 0.95
    assert max(one.correlation for one in other) < 0.4


def test_a_jump_at_a_border_is_seen_and_one_elsewhere_is_not_taken_for_it() -> None:
    video, _, _ = drawn([babble(FRAMES / FPS, 7)], 7)
    assert max(border_jumps(video, 33, 9)) < 5  # a mouth may open there
    jumped = video.clone()
    jumped[:, 33:] += 0.3
    assert border_jumps(jumped, 33, 9)[0] > 10
    jumped = video.clone()
    jumped[:, 40:] += 0.3
    assert border_jumps(jumped, 33, 9)[0] < 5


def test_what_the_speech_does_at_a_border_is_not_held_against_the_border() -> None:
    video, _, _ = drawn([babble(FRAMES / FPS, 7)], 7)
    opened = video.clone()
    opened[:, 33:] += 0.3  # the speech's doing: it is in both videos
    assert border_jumps(opened, 33, 9)[0] > 10
    assert border_excess(opened, opened, 33, 9) == pytest.approx([1.0, 1.0], abs=0.5)
    assert border_excess(opened, video, 33, 9)[0] > 5
    still = video[:, :1].expand(-1, FRAMES, -1, -1).clone()
    still[:, ::2] += 0.01  # where the other does not move, its median counts
    assert max(border_excess(still, still, 33, 9)) <= 1


def test_a_mouth_that_gapes_in_silence_is_seen() -> None:
    spoken = torch.from_numpy(mouth_of(babble(FRAMES / FPS, 8), FRAMES).opening)
    assert silence(spoken, spoken) == pytest.approx(0, abs=0.02)
    gaping = torch.where(spoken < 0.05, 0.8, spoken)
    gaping[0] = 0
    gaping[1] = 0
    assert silence(gaping, spoken) > 0.5
    assert math.isnan(silence(spoken, torch.ones_like(spoken)))


def test_identity_forgives_two_pixels_and_the_mouth_but_no_other_face() -> None:
    speech = babble(FRAMES / FPS, 9)
    _, image, boxes = drawn([speech], 9)
    moved = torch.roll(image, (1, -2), (1, 2))[:, None]
    assert float(identity(moved, image, boxes)[0]) > 60
    black = image.clone()
    left, top, right, bottom = (int(side) for side in boxes[0])
    black[:, top:bottom, left:right] = -1
    assert float(identity(black[:, None], image, boxes)[0]) > 60
    _, another, _ = drawn([speech], 10)
    assert float(identity(another[:, None], image, boxes)[0]) < 15


def test_correlation_and_allowed_losses() -> None:
    wave = torch.sin(torch.arange(50) * 0.7)
    assert float(correlation(wave, 3 * wave + 1)) == pytest.approx(1)
    assert float(correlation(wave, -wave)) == pytest.approx(-1)
    assert allowed_loss("sageattn_3_fp8", "fp8_e4m3fn_scaled") == pytest.approx(0.06)
    assert allowed_loss("sageattn_3", "fp4_scaled") == pytest.approx(0.16)
    assert allowed_loss("sdpa", "disabled") == pytest.approx(0.01)
