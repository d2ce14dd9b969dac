"""What step caches save and what they cost in error, on the demo's trained models, as a table.

    python -m wanvideo_infinitetalk.tools.step_cache [--steps 40] [--frames 161]

The share of passes that are not computed is about the time that is saved. Errors are of latents (relative, L2) and of
frames (PSNR), against the same run without a cache; the row without a cache and with another seed tells how far two
videos of the same sound lie apart.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..cli.demo import demo_job
from ..media.audio import load_speech
from ..media.images import load_image
from ..multitalk.wav2vec import Wav2Vec2Features
from ..pipeline.conditioning import Conditioning
from ..pipeline.long_video import generate
from ..pipeline.plan import plan_video
from ..pipeline.step_cache import EasyCache, StepCache, TeaCache
from ..wanvideo.checkpoints.dit import load_dit
from ..wanvideo.encoders.clip import ClipVision
from ..wanvideo.encoders.text import TextEncoder
from ..wanvideo.encoders.vae import WanVAE

CACHES: dict[str, StepCache] = {
    **{f"EasyCache {limit}": EasyCache(limit) for limit in (0.015, 0.05, 0.1)},
    **{f"TeaCache {limit}, no coefficients": TeaCache(limit) for limit in (0.03, 0.1, 0.2)},
}


class _Counts(logging.Handler):
    """Passes that were not computed, and all, of the lines in the log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.reused = self.passes = 0

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"step cache: (\d+) of (\d+) passes", record.getMessage())
        if found:
            self.reused, self.passes = self.reused + int(found[1]), self.passes + int(found[2])


@torch.inference_mode()
def rows(steps: int, frames: int) -> list[str]:
    """The table's lines."""
    logger = logging.getLogger("wanvideo_infinitetalk.pipeline.sampling")
    logger.setLevel(logging.INFO)
    lines = ["| cache | passes left out | error of latents | PSNR of frames |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder, demo_job(Path(folder) / "unused.mp4", models=folder) as job:
        assert job.files.wav2vec is not None
        assert job.files.clip_vision is not None
        features = Wav2Vec2Features.load(job.files.wav2vec, dtype=torch.float32)
        audio = [features(load_speech(path)) for path in job.audio]
        assert job.image is not None
        image = load_image(job.image)
        encoder = TextEncoder.load(job.files.text_encoder, dtype=torch.float32)
        prompt, negative = encoder.encode([job.prompt, job.negative])
        given = Conditioning([prompt], negative, audio, [image])
        vae = WanVAE.load(job.files.vae, dtype=torch.float32)
        clip = ClipVision.load(job.files.clip_vision, dtype=torch.float32)
        model = load_dit(job.files.model, job.files.adapter, base_dtype=torch.float32)
        base = replace(job.config, steps=steps, total_frames=min(frames, *(len(row) for row in audio)))
        exact: tuple[torch.Tensor, torch.Tensor] | None = None
        runs: list[tuple[str, StepCache | None, int]] = [("none", None, 0), ("none, another seed", None, 1)]
        for name, cache, seed in [*runs, *((name, cache, 0) for name, cache in CACHES.items())]:
            config = replace(base, seed=base.seed + seed, techniques=() if cache is None else (cache,))
            counts = _Counts()
            logger.addHandler(counts)
            plan = plan_video(config, image.size, [len(row) for row in audio])
            windows = list(generate(model, vae, clip, given, plan))
            logger.removeHandler(counts)
            latents = torch.stack([window.latents for window in windows])
            pixels = torch.cat([window.frames for window in windows])
            if exact is None:
                exact = latents, pixels
            error = float((latents - exact[0]).norm() / exact[0].norm())
            noise = float((pixels - exact[1]).square().mean())
            psnr = "" if noise == 0 else f"{-10 * math.log10(noise):.1f} dB"
            share = "" if cache is None else f"{counts.reused / counts.passes:.0%}"
            lines.append(f"| {name} | {share} | {error:.3f} | {psnr} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--frames", type=int, default=161)
    options = parser.parse_args(arguments)
    sys.stdout.write("\n".join(rows(options.steps, options.frames)) + "\n")


if __name__ == "__main__":
    main()
