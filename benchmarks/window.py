"""A whole window of a long video, part by part: 14B-shaped random weights, the public size, as the command makes it.

    python -m benchmarks.window [--steps 4] [--three-passes] [--plain-vae] [--profile] [--json F]

Three windows are made, and the last one is measured: it begins with frames carried over, and the one before is written
meanwhile, or, in the columns "in turn", before it begins. With random weights the frames are noise, which costs a video
encoder the most; in the columns "ordinary" a moving image of the same size is written instead. Run from the root of
the repository.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from wanvideo_infinitetalk.media.video import VideoWriter, Written
from wanvideo_infinitetalk.pipeline.attention_policy import bind
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.journal import Journal
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate
from wanvideo_infinitetalk.pipeline.make_video import FPS
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_video
from wanvideo_infinitetalk.pipeline.recorder import Recorder

from .common import PUBLIC_14B, SMALL, Report, choose_device, parser, random_model
from .vram import PUBLIC_VAE, SMALL_VAE, random_vae

MODE, QUANTIZATION = "sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"
SIZE, SMALL_SIZE = (832, 480), (64, 64)
FRAMES, SMALL_FRAMES = 81, 17
MOTION_FRAMES, SMALL_MOTION_FRAMES = 9, 5
WINDOWS = 3
GOAL = 2.9
"""Seconds per second of video, 4 steps, on an H200."""


class Timed:
    """The VAE, with the seconds that each of its calls takes; it waits for the GPU before and after."""

    def __init__(self, vae: Any, spent: dict[str, float], ordinary: bool) -> None:
        self.vae, self.spent, self.ordinary = vae, spent, ordinary

    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor:
        part = "encode the condition" if video.shape[2] > MOTION_FRAMES else "encode the carried frames"
        with timed(self.spent, part):
            latents: Tensor = self.vae.encode(video, tiled=tiled)
        return latents

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        with timed(self.spent, "decode"):
            frames = self.vae.decode(latents, tiled=tiled)
        return moving_image(frames) if self.ordinary else frames


class Clip:
    """Image tokens of random numbers; the tower itself runs once per image."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, image: Tensor) -> Tensor:
        return torch.randn(1, 257, self.width, device=image.device)


@contextmanager
def timed(spent: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds inside the `with` block to a part, the GPU's work included."""
    wait()
    begin = time.perf_counter()
    yield
    wait()
    spent[part] = spent.get(part, 0.0) + time.perf_counter() - begin


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def moving_image(frames: Tensor) -> Tensor:
    """Smooth shapes that drift, with the grain of a camera, in place of `frames` [1, 3, F, H, W]."""
    _, _, count, height, width = frames.shape
    across = torch.linspace(0, 6, width, device=frames.device)
    down = torch.linspace(0, 4, height, device=frames.device)[:, None]
    channels = torch.arange(3, device=frames.device)[:, None, None]
    made = [torch.sin(across + channels + 0.02 * i) * torch.cos(down + 0.03 * i) * 0.7 for i in range(count)]
    still = torch.stack(made, dim=1).unsqueeze(0)
    return still + 0.01 * torch.randn_like(still)


def measure(
    report: Report, model: Any, vae: Any, steps: int, cfg: float, *, ordinary: bool, in_turn: bool
) -> dict[str, float]:
    """Part -> seconds, of the last of the windows."""
    small, device = report.small, report.device
    width, height = SMALL_SIZE if small else SIZE
    frames, motion = (SMALL_FRAMES, SMALL_MOTION_FRAMES) if small else (FRAMES, MOTION_FRAMES)
    config = GenerateConfig(
        width=width,
        height=height,
        frames=frames,
        motion_frames=motion,
        steps=steps,
        cfg=cfg,
        audio_cfg=cfg,
        device=device,
        attention_policy=bind("default", MODE, len(model.blocks)),
    )
    wanted, audio = model.config, model.config.audio
    speech = torch.randn(frames + (WINDOWS - 1) * (frames - motion), audio.blocks, audio.channels)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    prompt = torch.randn(wanted.text_len, wanted.text_dim)
    plan = plan_video(config, image.size, [len(speech)])
    spent: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with timed(spent, "forwards") if name == "model" else timed({}, name):
            yield

    callbacks = Callbacks(stage=stage)
    given = Conditioning([prompt], prompt, [speech], [image])
    parts = (model, Timed(vae, spent, ordinary), Clip(wanted.clip_dim), given, plan, callbacks)
    windows = generate(*parts, frames_dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder) / "window.mp4", FPS) as writer:
        written = WrittenIn(writer)
        with Recorder(written, Journal(writer.files, {}, {}), Counter()) as recorder:  # type: ignore[arg-type]
            for window in windows:
                if window.index == WINDOWS - 1:
                    break  # it is handed out; what follows is the same for all
                recorder.add(window)
                if in_turn:
                    recorder.finish()
                spent.clear()
                begin = time.perf_counter()
            total = time.perf_counter() - begin
        if in_turn:
            spent["write"] = written.seconds[-1]
            total += written.seconds[-1]
    spent["the rest"] = total - sum(spent.values())
    spent["sum"] = total
    spent["seconds per second of video"] = total / (len(window.frames) / FPS)
    if not in_turn:
        spent["writing the one before, meanwhile"] = written.seconds[-1]
    return spent


class WrittenIn:
    """A writer that notes the seconds of each call."""

    def __init__(self, writer: VideoWriter) -> None:
        self.writer, self.explained, self.seconds = writer, writer.explained, list[float]()

    def append(self, frames: Tensor) -> Written:
        begin = time.perf_counter()
        written = self.writer.append(frames)
        self.seconds.append(time.perf_counter() - begin)
        return written


def gaps(found: profile) -> list[dict[str, str | int | float]]:
    """The longest times in which the GPU did nothing: when, since its first work, and what ran before and after."""
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    )
    rows: list[dict[str, str | int | float]] = []
    begin, end, last = events[0]
    for start, until, name in events:
        row = {"at, s": (end - begin) / 1e6, "gap, ms": (start - end) / 1e3, "after": last[:50], "before": name[:50]}
        rows.append(row)
        if until > end:
            end, last = until, name
    return sorted(rows, key=lambda row: -float(row["gap, ms"]))[:10]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=4, help="of each window (%(default)s)")
    options.add_argument("--three-passes", action="store_true", help="with text and audio guidance, as without a LoRA")
    options.add_argument("--profile", action="store_true", help="the longest times in which the GPU did nothing")
    options.add_argument("--plain-vae", action="store_true", help="the VAE in diffusers' own way")
    arguments = options.parse_args()
    report = Report("window", "A whole window", choose_device(arguments.small), arguments.small)
    device = report.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.inference_mode():
        torch.manual_seed(0)
        model = random_model(SMALL if report.small else PUBLIC_14B, device, dtype, QUANTIZATION, MODE)
        vae = random_vae(SMALL_VAE if report.small else PUBLIC_VAE, device, dtype)
        vae.channels_last = False if arguments.plain_vae else None
        cfg = 5.0 if arguments.three_passes else 1.0
        run = partial(measure, report, model, vae, arguments.steps, cfg)
        rows = {
            name: run(ordinary=name.startswith("ordinary"), in_turn=name.endswith("in turn"))
            for name in ("noise, in turn", "noise", "ordinary, in turn", "ordinary")
        }
        parts = list(dict.fromkeys(part for spent in rows.values() for part in spent))
        report.table(
            f"Window {WINDOWS}, {arguments.steps} steps, {MODE}, {QUANTIZATION}",
            [{"part, s": part, **{name: spent.get(part, 0.0) for name, spent in rows.items()}} for part in parts],
        )
        if arguments.profile:
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                run(ordinary=True, in_turn=False)
            report.table(f"The longest gaps on the GPU, of {WINDOWS} windows", gaps(found))
    if arguments.steps == 4 and not arguments.three_passes:
        report.goal(
            "seconds per second of video, an ordinary image", rows["ordinary"]["seconds per second of video"], GOAL
        )
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
