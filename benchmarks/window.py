"""A whole window of a long video, part by part: 14B-shaped random weights, the public size, as the command makes it.

    python -m benchmarks.window [--steps 4] [--three-passes] [--plain-vae] [--json F]

Two windows are made; the second one, which begins with frames carried over, is measured. With random weights the frames
are noise, which costs a video encoder the most; the row "ordinary" writes a moving image of the same size instead. Run
from the root of the repository.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from wanvideo_infinitetalk.media.video import VideoWriter
from wanvideo_infinitetalk.pipeline.attention_policy import bind
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate
from wanvideo_infinitetalk.pipeline.make_video import FPS
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_video

from .common import PUBLIC_14B, SMALL, Report, choose_device, parser, random_model
from .vram import PUBLIC_VAE, SMALL_VAE, random_vae

MODE, QUANTIZATION = "sageattn_3_fp8", "fp8_e4m3fn_scaled_fast"
SIZE, SMALL_SIZE = (832, 480), (64, 64)
FRAMES, SMALL_FRAMES = 81, 17
MOTION_FRAMES, SMALL_MOTION_FRAMES = 9, 5
GOAL = 2.9
"""Seconds per second of video, 4 steps, on an H200."""


class Timed:
    """The VAE, with the seconds that each of its calls takes; it waits for the GPU before and after."""

    def __init__(self, vae: Any, spent: dict[str, float], ordinary: bool) -> None:
        self.vae, self.spent, self.ordinary = vae, spent, ordinary

    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor:
        part = "encode the condition" if video.shape[2] > MOTION_FRAMES else "encode the carried frames"
        with timed(self.spent, part):
            return self.vae.encode(video, tiled=tiled)

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


def measure(report: Report, model: Any, vae: Any, steps: int, cfg: float, ordinary: bool) -> dict[str, float]:
    """Part -> seconds, of the second of two windows."""
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
    speech = torch.randn(2 * frames - motion, audio.blocks, audio.channels)
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
    windows = generate(model, Timed(vae, spent, ordinary), Clip(wanted.clip_dim), given, plan, callbacks)
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder) / "window.mp4", FPS) as writer:
        writer.append(next(windows).frames)
        wait()
        spent.clear()
        begin = time.perf_counter()
        window = next(windows)
        with timed(spent, "write"):
            writer.append(window.frames)
        total = time.perf_counter() - begin
    spent["the rest"] = total - sum(spent.values())
    spent["sum"] = total
    spent["seconds per second of video"] = total / (len(window.frames) / FPS)
    return spent


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=4, help="of each window (%(default)s)")
    options.add_argument("--three-passes", action="store_true", help="with text and audio guidance, as without a LoRA")
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
        rows = {
            name: measure(report, model, vae, arguments.steps, cfg, ordinary)
            for name, ordinary in (("noise", False), ("ordinary", True))
        }
    table: list[dict[str, str | int | float]] = [
        {"part, s": part, **{name: spent.get(part, 0.0) for name, spent in rows.items()}} for part in rows["noise"]
    ]
    report.table(f"The second window, {arguments.steps} steps, {MODE}, {QUANTIZATION}", table)
    if arguments.steps == 4 and not arguments.three_passes:
        report.goal(
            "seconds per second of video, an ordinary image", rows["ordinary"]["seconds per second of video"], GOAL
        )
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
