"""A stream as it is watched: FlashTalk's shape with random weights, window after window into H.264.

    python -m benchmarks.stream [--frames 1000] [--steps 4] [--compile] [--json F]

Speech is there as soon as it is asked for, so that the frames come as fast as they are made. A window's time is that
from the one before until its frames are handed to the video encoder, which works meanwhile; where all of them stay
below 1.12 s, a stream that is spoken meanwhile never stops. The first image counts from the first piece of speech, the
models being loaded; a run before it has chosen the kernels. Random weights paint noise, which costs a video encoder the
most. Run from the root of the repository.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Wav2Vec2Config, Wav2Vec2Model
from wanvideo_infinitetalk.cli.tiny_models import decoder_weights
from wanvideo_infinitetalk.media.video import StreamWriter
from wanvideo_infinitetalk.multitalk.wav2vec import Wav2Vec2Features
from wanvideo_infinitetalk.pipeline.attention_policy import SAFER, bind
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning, WindowConditioner
from wanvideo_infinitetalk.pipeline.flashtalk import SAMPLES_A_FRAME, SpeechRing
from wanvideo_infinitetalk.pipeline.long_video import Callbacks, generate_windows
from wanvideo_infinitetalk.pipeline.make_video import FPS
from wanvideo_infinitetalk.pipeline.plan import FLASHTALK, GenerateConfig, plan_video
from wanvideo_infinitetalk.pipeline.presets import FLASHTALK_14B
from wanvideo_infinitetalk.pipeline.stream import StreamedWindow, StreamRecorder
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import SmallDecoder
from wanvideo_infinitetalk.wanvideo.encoders.vae import VideoDecoder, WanVAE
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings, compile_limits, compile_model

from .common import PUBLIC_14B, SMALL, Report, begin, parser, random_model
from .vram import PUBLIC_VAE, SMALL_VAE, random_vae
from .window import MODE, QUANTIZATION, Clip

FRAMES, SMALL_FRAMES = 1000, 20
SMALL_SIZE = {"width": 32, "height": 32, "frames": 13, "steps": 1}
TAE_WIDTHS, SMALL_WIDTHS = (256, 128, 64, 64), (16, 8, 8, 8)
SPEECH_WIDTHS: dict[str, Any] = {"conv_dim": (8,) * 7, "num_conv_pos_embedding_groups": 4, "intermediate_size": 32}
GOAL_SECONDS = 1.5
"""From the first speech to the first image."""
GOAL_FRAMES = 14
"""A second, on one H200; a stream that is spoken meanwhile needs 25."""


class Split:
    """What encodes, and what decodes."""

    def __init__(self, vae: WanVAE, decoder: VideoDecoder) -> None:
        self.encode, self.decode = vae.encode, decoder.decode


def speech_encoder(report: Report, layers: int, width: int) -> Wav2Vec2Features:
    """wav2vec2 of random weights, with so many layers of that width."""
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "attn_implementation": "eager",
    }
    sizes |= SPEECH_WIDTHS if report.small else {}
    model: Any = Wav2Vec2Model(Wav2Vec2Config(**sizes))
    model = model.requires_grad_(False).eval().to(report.device)
    return Wav2Vec2Features(model, do_normalize=True)


def streamed(report: Report, config: GenerateConfig, model: Any, encoder: Any, vae: Any, frames: int) -> list[float]:
    """Seconds from the beginning, of each window, when it has been handed to what writes."""
    audio, wanted = model.config.audio, model.config
    height, width = config.height, config.width
    assert height is not None
    assert width is not None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    plan = plan_video(config, image.size, [frames])
    speech = np.random.default_rng(1).normal(size=frames * SAMPLES_A_FRAME).astype(np.float32) * 0.1
    prompt = torch.randn(wanted.text_len, wanted.text_dim)
    times: list[float] = []
    with open(os.devnull, "wb", buffering=0) as nowhere, StreamRecorder(StreamWriter(nowhere, FPS)) as recorder:
        begin = time.perf_counter()
        ring = SpeechRing(encoder, speech)
        assert ring.shape == (audio.blocks, audio.channels)
        given = Conditioning([prompt], prompt, ring, [image])
        conditioner = WindowConditioner(vae, Clip(wanted.clip_dim), given, plan, Callbacks().stage)
        for made in generate_windows(model, vae, conditioner, plan, Callbacks(), SAFER, frames_dtype=torch.uint8):
            recorder.add(StreamedWindow(made.index, made.count, made.frames, None, None))
            times.append(time.perf_counter() - begin)
    return times


def row(name: str, times: list[float], frames: int, new: int) -> dict[str, str | int | float]:
    """The windows behind the first one are what is sustained; the last one may be short, and is left out."""
    spent = [later - before for before, later in pairwise(times[:-1])] or times[:1]
    return {
        "decoder": name,
        "frames": frames,
        "frames per second": new / statistics.mean(spent),
        "first image, s": times[0],
        "window, s": statistics.median(spent),
        "longest window, s": max(spent),
        "jitter (deviation), s": statistics.pstdev(spent),
    }


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--frames", type=int, help=f"of each stream ({FRAMES}; {SMALL_FRAMES} with --small)")
    options.add_argument("--steps", type=int, help="of each window (4; 1 with --small)")
    options.add_argument("--compile", action="store_true", help="compile the blocks of the transformer")
    report, arguments = begin(options, "stream", "A stream")
    device, small = report.device, report.small
    frames = arguments.frames or (SMALL_FRAMES if small else FRAMES)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    settings = FLASHTALK_14B | (SMALL_SIZE if small else {})
    settings |= {"steps": arguments.steps} if arguments.steps else {}
    compiled = CompileSettings() if arguments.compile else None
    with torch.inference_mode(), compile_limits(compiled):
        torch.manual_seed(0)
        model = random_model(SMALL if small else PUBLIC_14B, device, dtype, QUANTIZATION, MODE)
        if compiled is not None:
            compile_model(model, compiled)
        policy = bind("default", MODE, len(model.blocks))
        config = GenerateConfig(mode=FLASHTALK, device=device, attention_policy=policy, **settings)
        audio = model.config.audio
        assert audio is not None
        encoder = speech_encoder(report, audio.blocks, audio.channels)
        vae = random_vae(SMALL_VAE if small else PUBLIC_VAE, device, dtype)
        tae = SmallDecoder.from_state_dict(
            decoder_weights(SMALL_WIDTHS if small else TAE_WIDTHS), denormalize=False, dtype=dtype, device=device
        )
        new = config.frames - config.motion_frames
        rows = []
        for name, decoder in (("Wan VAE", vae), ("taew2_1", tae)):
            parts = Split(vae, decoder)
            if not small:
                streamed(report, config, model, encoder, parts, 2 * new)  # kernels are chosen, and compiled
            rows.append(row(name, streamed(report, config, model, encoder, parts, frames), frames, new))
    shape = f"{config.width} x {config.height}, {config.frames} / {config.motion_frames} frames, {config.steps} steps"
    report.table(f"{shape}, {MODE}, {QUANTIZATION}", rows)
    report.goal("first image by taew2_1, s", float(rows[1]["first image, s"]), GOAL_SECONDS)
    report.goal(f"{new} frames by taew2_1, s", new / float(rows[1]["frames per second"]), new / GOAL_FRAMES)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
