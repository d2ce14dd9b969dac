"""Does the mouth follow the speech? The talking set in attention modes and quantizations, read from the pixels.

    python -m benchmarks.lipsync [--json F]                       the demo's sentence, every mode and quantization here
    python -m benchmarks.lipsync --recordings A.wav B.wav --seconds 30 --modes sdpa --quantizations disabled
    python -m benchmarks.lipsync --speakers A.wav B.wav           two people in one image, one recording each
    python -m benchmarks.lipsync --modes sdpa --quantizations disabled --borders    again, with borders elsewhere

Faces are drawn, and were not in the training. A mouth's opening is how dark the middle of its box is, frame by frame;
it is compared with what `tools.demo_model.rule` makes of the recording. Nothing of the model is asked. Videos are read
back from the files that a user gets. Run from the root of the repository; on a CPU, too, where it takes about 6 s for
each second of video.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from wanvideo_infinitetalk.cli.demo import FRAMES as WINDOW
from wanvideo_infinitetalk.cli.demo import MOTION, SIZE, demo_job
from wanvideo_infinitetalk.fp8_optimization import QUANTIZATIONS
from wanvideo_infinitetalk.media.audio import load_speech, read_audio
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.pipeline.make_video import FPS, Job, choose_device, make_video
from wanvideo_infinitetalk.tools.demo_model.faces import draw, mouth_boxes, random_faces, rest
from wanvideo_infinitetalk.tools.demo_model.rule import mouth_of
from wanvideo_infinitetalk.wanvideo.modules.attention import ATTENTION_MODES, mode_supported

from .common import Report, parser

__all__ = [
    "Reading",
    "border_excess",
    "border_jumps",
    "correlation",
    "identity",
    "lag",
    "openings",
    "read_video",
    "silence",
    "speaking",
]

SEED = 990_000
"""Of the faces; training draws its own from small seeds."""

FURTHEST = 10
"""Frames, the largest lag that is looked for."""

CORRELATION, LAG, IDENTITY, JUMP = 0.7, 1, 25.0, 2.0
ELSEWHERE = WINDOW - 4
"""Frames of the windows of a video whose borders fall elsewhere: none is shared within 49 s."""
OWN, OTHER = 0.5, 0.2
LOSSES = {"fp4": 0.08, "fp8": 0.03}
"""What a run may lose of the baseline's correlation, by a part of the mode's or the quantization's name."""
BASELINE = ("sdpa", "disabled")
"""Mode and quantization that is always run first."""


# --------------------------------------------------------------------------------------------------- reading the pixels


def openings(video: Tensor, boxes: Tensor) -> Tensor:
    """How dark the middle of each mouth's box is, 0 to 1.

    Args:
        video: [B, 3, F, H, W] in [-1, 1]. boxes: [B, people, 4] of left, top, right, bottom in pixels.

    Returns:
        [B, people, F]. Full weight below a luma of 0.24, none above 0.36: skin is lighter, the inside of mouths darker.
    """
    luma = (video * video.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(1) / 2 + 0.5  # [B, F, H, W]
    dark = ((0.36 - luma) / 0.12).clamp(0, 1)
    y = torch.arange(luma.shape[2], device=luma.device)[:, None] + 0.5
    x = torch.arange(luma.shape[3], device=luma.device)[None] + 0.5
    read = []
    for box in boxes.unbind(1):
        left, top, right, bottom = (side[:, None, None] for side in box.unbind(1))
        middle, half = (left + right) / 2, (right - left) / 4
        inside = ((x - middle).abs() < half) & (y > top) & (y < bottom)
        read.append((dark * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None])
    return torch.stack(read, dim=1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, along the last axis; 0 where one of the two does not move."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    largest: Tensor = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / largest.clamp(min=1e-6)


def lag(seen: Tensor, spoken: Tensor) -> int:
    """By how many frames the mouth `seen` [F] comes after what is `spoken` [F]: where their correlation is highest."""
    count = len(seen)

    def at(shift: int) -> float:
        late, early = seen[max(0, shift) : count + min(0, shift)], spoken[max(0, -shift) : count - max(0, shift)]
        return float(correlation(late, early))

    return max(range(-FURTHEST, FURTHEST + 1), key=lambda shift: (at(shift), -abs(shift)))


def silence(seen: Tensor, spoken: Tensor) -> float:
    """How far the mouth is open in silence, as a share of the way from its least to its usual opening in loud speech.

    0 is closed. Silence begins three frames after the last sound and is a `spoken` opening below 0.02; NaN without any.
    """
    quiet = spoken < 0.02
    for _ in range(3):
        quiet = quiet & torch.cat([quiet[:1], quiet[:-1]])
    loud = spoken > 0.6
    if not quiet.any() or not loud.any():
        return float("nan")
    closed = seen.quantile(0.02)
    return float((seen[quiet].mean() - closed) / (seen[loud].mean() - closed).clamp(min=1e-3))


def _outside(boxes: Tensor, height: int, width: int, margin: int = 3) -> Tensor:
    """[H, W], true outside the mouths [people, 4] and a margin of pixels around them."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    inside = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes.tolist():
        inside |= (x > left - margin) & (x < right + margin) & (y > top - margin) & (y < bottom + margin)
    return ~inside


def identity(video: Tensor, image: Tensor, boxes: Tensor, reach: int = 2) -> Tensor:
    """PSNR in dB, [F], of the frames [3, F, H, W] against the image [3, H, W], both in [-1, 1], outside the mouths.

    The head may have moved: of all shifts by up to `reach` pixels the best counts.
    """
    keep = _outside(boxes, *image.shape[1:])
    best = torch.full((video.shape[1],), float("inf"))
    for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
        moved = torch.roll(image, (dy, dx), (1, 2))
        inner = keep.clone()
        if reach:
            inner[:reach] = inner[-reach:] = inner[:, :reach] = inner[:, -reach:] = False
        error = (video - moved[:, None]).square().mean(0)[:, inner].mean(1)  # [F]
        best = torch.minimum(best, error)
    return -10 * torch.log10(best / 4)


def border_jumps(video: Tensor, window: int, motion: int) -> list[float]:
    """For each border between windows: the change from frame to frame there over the median change elsewhere.

    A change is the root of the mean squared difference of all pixels of `video` [3, F, H, W].
    """
    change = video.diff(dim=1).square().mean((0, 2, 3)).sqrt()  # [F - 1], entry f from frame f to f + 1
    borders = [frame - 1 for frame in range(window, video.shape[1], window - motion)]
    elsewhere = torch.ones(len(change), dtype=torch.bool)
    elsewhere[borders] = False
    usual = change[elsewhere].median()
    return [float(change[border] / usual) for border in borders]


def border_excess(video: Tensor, other: Tensor, window: int, motion: int) -> list[float]:
    """For each border of `video`: the change there over what `other` has between the same frames, without a border.

    A border that falls where a mouth opens is crossed by a change of the speech's own; `other` [3, F, H, W] is of the
    same image and recording, and shows it. Where it hardly moves, its median change counts.
    """
    here, there = (frames.diff(dim=1).square().mean((0, 2, 3)).sqrt() for frames in (video, other))
    usual = there.median()
    borders = [frame - 1 for frame in range(window, video.shape[1], window - motion)]
    return [float(here[border] / torch.maximum(there[border], usual)) for border in borders]


@dataclass(frozen=True)
class Reading:
    """What one mouth did in a video, and how far the rest stayed the same."""

    correlation: float
    lag: int
    silence: float
    identity: float  # dB, mean over the last second
    jumps: list[float]  # of each border between windows


def read_video(
    video: Tensor, image: Tensor, boxes: Tensor, speech: Sequence[np.ndarray], window: int, motion: int
) -> list[Reading]:
    """One reading for each of `speech`, samples at 16 kHz, in the order of the mouths.

    Args:
        video: [3, F, H, W] in [-1, 1]. image: [3, H, W]. boxes: [people, 4] in pixels.
    """
    count = int(video.shape[1])
    seen = openings(video[None], boxes[None])[0]
    same = float(identity(video[:, -FPS:], image, boxes).mean())
    jumps = border_jumps(video, window, motion)
    readings = []
    for own, wave in zip(seen, speech, strict=True):
        spoken = torch.from_numpy(mouth_of(wave, count).opening)
        both = (own[3:], spoken[3:])  # a mouth needs three frames to leave the image
        readings.append(Reading(float(correlation(*both)), lag(*both), silence(*both), same, jumps))
    return readings


# --------------------------------------------------------------------------------------------------------------- making


@dataclass(frozen=True)
class Scene:
    """A drawn image [3, H, W] in [-1, 1] and its mouths [people, 4]."""

    image: Tensor
    boxes: Tensor

    @classmethod
    def of(cls, seed: int, people: int = 1) -> Scene:
        generator = torch.Generator().manual_seed(SEED + seed)
        middles = [0.0] if people == 1 else [-1.0, 1.0]
        faces = [random_faces(1, generator, middle) for middle in middles]
        image = draw(faces, [rest(1) for _ in faces], SIZE, SIZE * people)[0, :, 0]
        return cls(image, torch.cat([mouth_boxes(face, SIZE, SIZE * people) for face in faces]))

    def save(self, path: Path) -> Path:
        pixels = ((self.image + 1) * 127.5).round().clamp(0, 255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        return path


@contextmanager
def speaking(scene: Scene, recordings: Sequence[Path], folder: Path, seconds: float | None) -> Iterator[Job]:
    """The demo's job with this image and these recordings."""
    width = int(scene.image.shape[2])
    with demo_job(folder / "video.mp4", models=folder / "models") as job:
        yield replace(
            job,
            audio=tuple(recordings),
            image=scene.save(folder / "image.png"),
            config=replace(job.config, width=width),
            max_frames=None if seconds is None else round(seconds * FPS),
        )


def frames_of(path: Path) -> Tensor:
    """A video file as [3, F, H, W] in [-1, 1]."""
    frames = VideoFrames(path)
    stacked = np.stack([np.asarray(frames[i]) for i in range(len(frames))])
    video = torch.from_numpy(stacked)
    video = video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video.float() * 2 - 1
    return video.permute(3, 0, 1, 2)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two videos in [-1, 1], dB; infinite when they are the same."""
    return float(-10 * torch.log10((a - b).square().mean() / 4))


def allowed_loss(mode: str, quantization: str) -> float:
    """Of correlation, for this mode and quantization together."""
    mode = "sageattn_3_fp4" if mode == "sageattn_3" else mode
    return sum(
        max((loss for part, loss in LOSSES.items() if part in name), default=0.005) for name in (mode, quantization)
    )


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--recordings", nargs="+", type=Path, metavar="WAV", help="(the demo's sentence)")
    options.add_argument("--speakers", nargs=2, type=Path, metavar="WAV", help="two people instead of one")
    options.add_argument("--seconds", type=float, help="where to stop (at the recording's end)")
    options.add_argument("--modes", nargs="+", default=None, metavar="M", help="attention modes (all that run here)")
    options.add_argument("--quantizations", nargs="+", default=list(QUANTIZATIONS), metavar="Q", help="(all)")
    options.add_argument("--borders", action="store_true", help="compare with a video whose borders fall elsewhere")
    options.add_argument("--faces", type=int, default=1, help="images for each recording (%(default)s)")
    options.add_argument("--device", default="auto", help="(%(default)s)")
    given = options.parse_args()
    device = choose_device(given.device)
    report = Report("lipsync", "Lip-sync", device, given.small)
    modes = given.modes or [mode for mode in ATTENTION_MODES if mode_supported(mode, device)]
    quantizations = given.quantizations
    if given.small:
        given.seconds, modes, quantizations = 1.0, modes[:1], quantizations[:1]
    sentence = files("wanvideo_infinitetalk").joinpath("assets").joinpath("speech.wav")
    with tempfile.TemporaryDirectory(prefix="lipsync-") as temporary, as_file(sentence) as demo:
        folder = Path(temporary)
        cases = [tuple(given.speakers)] if given.speakers else [(path,) for path in given.recordings or [demo]]
        for recordings, seed in itertools.product(cases, range(given.faces)):
            measure(report, recordings, seed, given.seconds, modes, quantizations, folder, given.device, given.borders)
    return report.finish(given.json)


def measure(
    report: Report,
    recordings: Sequence[Path],
    seed: int,
    seconds: float | None,
    modes: Sequence[str],
    quantizations: Sequence[str],
    folder: Path,
    device: str,
    borders: bool = False,
) -> None:
    """Make and read the videos of one image and its recordings, one of each mode and quantization.

    Args:
        borders: make the first one again with windows of `ELSEWHERE` frames, to see what a border adds to the speech.
    """
    scene = Scene.of(seed, len(recordings))
    speech = [load_speech(*read_audio(path)) for path in recordings]
    rows: list[dict[str, str | int | float]] = []
    first: Tensor | None = None
    best = 0.0
    excess: list[float] = []
    with speaking(scene, recordings, folder, seconds) as job:
        pairs = [BASELINE, *(pair for pair in itertools.product(modes, quantizations) if pair != BASELINE)]
        for mode, quantization in pairs:
            result = make_video(replace(job, attention_mode=mode, quantization=quantization, device=device))
            video = frames_of(result.path)
            count = int(video.shape[1])
            spoken = [wave[: count * 16_000 // FPS] for wave in speech]
            readings = read_video(video, scene.image, scene.boxes, spoken, WINDOW, MOTION)
            first = video if first is None else first
            mean = statistics.mean(one.correlation for one in readings)
            best = best or mean
            row: dict[str, str | int | float] = {"mode": mode, "quantization": quantization}
            for name, one in zip(("", ", right"), readings, strict=False):
                row |= {f"correlation{name}": one.correlation, f"lag{name}": one.lag, f"silence{name}": one.silence}
            if len(readings) == 2:
                row["with the other's"] = max(_crosswise(video, scene.boxes, spoken))
            row["identity, dB"] = readings[0].identity
            if jumps := readings[0].jumps:
                row |= {"jump": statistics.median(jumps), "largest": max(jumps)}
            row["PSNR to the first row, dB"] = psnr(video, first)
            row["seconds"] = result.seconds
            rows.append(row)
            what = f"{mode}, {quantization}: correlation"
            report.goal(f"{what} lost", best - mean, allowed_loss(mode, quantization))
        if borders and first is not None and "jump" in rows[0]:
            job = replace(job, config=replace(job.config, frames=ELSEWHERE))
            other = frames_of(make_video(replace(job, attention_mode=BASELINE[0], device=device)).path)
            excess = border_excess(first, other, WINDOW, MOTION)
    names = " and ".join(path.stem for path in recordings)
    report.table(f"{names}, {count / FPS:.1f} s, face {seed}", rows)
    least = OWN if len(recordings) == 2 else CORRELATION
    report.goal("correlation missing", least - best, 0.0)
    report.goal("lag in frames, either way", abs(int(rows[0]["lag"])), LAG)
    report.goal("identity missing, dB", IDENTITY - float(rows[0]["identity, dB"]), 0.0)
    if excess:
        what = "change at a border over that of the same frames where windows end elsewhere: median"
        report.goal(what, statistics.median(excess), JUMP)
        report.goal("the largest", max(excess), JUMP)
    if "jump" in rows[0]:
        report.goal("median over the borders of a border's change over the median change", float(rows[0]["jump"]), JUMP)
    if len(recordings) == 2:
        report.goal("correlation with the other's speech", float(rows[0]["with the other's"]), OTHER)


def _crosswise(video: Tensor, boxes: Tensor, speech: Sequence[np.ndarray]) -> list[float]:
    """Correlation of each of two mouths with the other's recording."""
    seen = openings(video[None], boxes[None])[0]
    spoken = [torch.from_numpy(mouth_of(wave, int(video.shape[1])).opening) for wave in reversed(speech)]
    return [float(correlation(own[3:], other[3:])) for own, other in zip(seen, spoken, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
