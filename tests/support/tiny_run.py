"""Generations on the random tiny models, in memory: everything but the transformer is loaded and computed once.

The path is that of `make_video`: files, encoders, loop. How far a mode or a quantization may move the latents
of a window is data here, so that the CPU and the GPU suite hold them to the same bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from wanvideo_infinitetalk.cli.demo import demo_job
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media.audio import load_speech
from wanvideo_infinitetalk.media.images import load_image
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.pipeline.attention_policy import bind
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.long_video import FinishedWindow, generate
from wanvideo_infinitetalk.pipeline.make_video import Job
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_video
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import load_dit
from wanvideo_infinitetalk.wanvideo.encoders.clip import ClipVision
from wanvideo_infinitetalk.wanvideo.encoders.text import TextEncoder
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.kernels.layout import GuardStats, count_guards
from wanvideo_infinitetalk.wanvideo.modules.attention import MODE_BACKENDS, mode_reasons

WINDOW = 17
"""Frames: 5 latent ones, 180 tokens, more than the fewest keys (128) that any kernel asks for."""

SETTINGS = GenerateConfig(width=96, height=96, motion_frames=5, steps=3, shift=7.0, cfg=5.0)
"""Text and audio guidance, unlike the demo's own: three evaluations a step."""

# Relative L2 of one window's clean latents against mode "sdpa" without quantization, after three guided steps in
# float32: the least that a mode differs by, which shows that it was not sdpa in disguise, and the most, twice what
# was measured. The guidance (scales 5 and 4) multiplies every difference between two forwards.
MODE_BOUNDS: dict[str, tuple[float, float]] = {
    "sdpa": (0.0, 0.0),
    "auto": (0.0, 0.005),  # sdpa below 2,048 keys; above that it may take 8 bits
    "comfy": (0.0, 1e-4),
    "eager": (1e-9, 1e-4),
    "flash_attn_2": (1e-9, 0.001),
    "flash_attn_3": (1e-9, 0.001),
    "sageattn": (1e-4, 0.005),
    "sageattn_3_fp8": (1e-4, 0.005),
    "sageattn_3": (1e-3, 0.02),
    "sageattn_3_fp4": (1e-3, 0.02),
}

QUANTIZATION_BOUNDS: dict[str, tuple[float, float]] = {
    "disabled": (0.0, 0.0),
    "fp8_e4m3fn": (0.01, 0.08),
    "fp8_e4m3fn_scaled": (0.01, 0.08),
    "fp8_e4m3fn_fast": (0.01, 0.12),
    "fp8_e4m3fn_scaled_fast": (0.01, 0.12),
    "fp8_e5m2": (0.02, 0.18),
    "fp8_e5m2_scaled": (0.02, 0.18),
    "fp8_e5m2_fast": (0.02, 0.2),
    "fp8_e5m2_scaled_fast": (0.02, 0.2),
    "fp4_scaled": (0.05, 0.27),
}

# How far the latents of two exact modes lie apart when everything is computed in that dtype.
ROUNDING: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.025}


def latent_bound(mode: str, quantization: str, dtype: torch.dtype) -> float:
    """How far the latents may lie from those of "sdpa" and "disabled", all of it in `dtype`."""
    return math.hypot(MODE_BOUNDS[mode][1], QUANTIZATION_BOUNDS[quantization][1], ROUNDING[dtype])


@dataclass(frozen=True)
class Prepared:
    """What all runs share. `job` names files and settings, `config` has the device in it."""

    job: Job
    vae: WanVAE
    clip: ClipVision
    conditioning: Conditioning
    config: GenerateConfig
    dtype: torch.dtype


@dataclass(frozen=True)
class Made:
    """What one run made, and what its guards did."""

    windows: list[FinishedWindow]
    guards: GuardStats

    @property
    def latents(self) -> torch.Tensor:
        """Of all windows [N, 16, T, h, w], float32 on the CPU."""
        return torch.stack([window.latents.float().cpu() for window in self.windows])

    @property
    def frames(self) -> torch.Tensor:
        """The video [F, H, W, 3]."""
        return torch.cat([window.frames for window in self.windows])


@torch.inference_mode()
def prepare(
    tiny: TinySet, device: str | torch.device, dtype: torch.dtype, frames: int = WINDOW, window: int = WINDOW
) -> Prepared:
    """Load and run the encoders of the demo for a video of `frames`, made in windows of `window`."""
    with demo_job("unused.mp4", models=tiny.model.parent) as demo:
        job = replace(demo, config=SETTINGS)
        features = Wav2Vec2Features.load(job.files.wav2vec, dtype=torch.float32, device=device)
        audio = [features(load_speech(path)) for path in job.audio]
        image = load_image(job.image)
    encoder = TextEncoder.load(job.files.text_encoder, dtype=dtype, device=device)
    prompt, negative = (context.float() for context in encoder.encode([job.prompt, job.negative]))
    return Prepared(
        job=job,
        vae=WanVAE.load(job.files.vae, dtype=torch.bfloat16 if dtype == torch.float16 else dtype, device=device),
        clip=ClipVision.load(job.files.clip_vision, dtype=dtype, device=device),
        conditioning=Conditioning([prompt], negative, audio, [image]),
        config=replace(job.config, device=device, frames=window, total_frames=frames),
        dtype=dtype,
    )


@torch.inference_mode()
def run(given: Prepared, mode: str, quantization: str, policy: str = "default") -> Made:
    """Generate with one attention mode and one quantization; non-finite values are an error, not a reason to retry."""
    files = given.job.files
    device = given.config.device
    model = load_dit(files.model, files.adapter, base_dtype=given.dtype, quantization=quantization, device=device)
    config = replace(given.config, attention_policy=bind(policy, mode, model.config.num_layers))
    conditioning = given.conditioning
    plan = plan_video(config, conditioning.source[0].size, [len(rows) for rows in conditioning.audio])
    with count_guards() as guards:
        windows = list(generate(model, given.vae, given.clip, given.conditioning, plan, fallback={}))
    return Made(windows, guards)


def why_not(mode: str, device: str | torch.device) -> str:
    """Why no backend of `mode` can run on `device`; empty when one can."""
    found = mode_reasons(torch.device(device))[mode]
    if any(not found[name] for name in MODE_BACKENDS[mode]):
        return ""
    return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in found.items())
