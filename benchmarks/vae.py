"""Encoding and decoding a window: the VAE with channels last and in diffusers' own way, at the public size, and a small
decoder.

    python -m benchmarks.vae [--rounds N] [--json F]

Random weights in bf16; errors are relative L2 against the same weights in float32, on a smaller clip. Peaks hold the
weights and the whole result. Run from the root of the repository.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from wanvideo_infinitetalk.cli.tiny_models import DECODER_WIDTHS
from wanvideo_infinitetalk.wanvideo.encoders.small_decoder import PUBLIC_WIDTHS, SmallDecoder, SmallNetwork
from wanvideo_infinitetalk.wanvideo.encoders.vae import WanVAE
from wanvideo_infinitetalk.wanvideo.linear.base import relative_l2

from .common import Report, choose_device, interleaved, parser, ratio
from .vram import PUBLIC_VAE, SMALL_VAE, measured, random_vae

FRAMES, HEIGHT, WIDTH = 81, 480, 832
MOTION_FRAMES = 9
SMALL = (17, 64, 96)
"""Frames, height and width for the errors, and for a small run."""

PLAIN, OURS, SMALL_DECODER = "diffusers", "channels last", "small decoder"
GOALS = {"decode": 900.0, "encode": 600.0}
"""Milliseconds on an H200."""

Calls = dict[str, Callable[[], Tensor]]


def both_ways(vae: WanVAE) -> dict[str, WanVAE]:
    """Way through memory -> the VAE, with the same weights."""
    return {PLAIN: WanVAE(vae.model, vae.config, False), OURS: WanVAE(vae.model, vae.config, True)}


def random_small_decoder(widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> SmallDecoder:
    with torch.device(device):
        network = SmallNetwork(widths)
    return SmallDecoder(network.to(dtype).requires_grad_(False).eval(), denormalize=False)


def clip(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(video [1, 3, F, H, W] in [-1, 1], latents [1, 16, T, H / 8, W / 8]), random."""
    frames, height, width = size
    video = torch.rand(1, 3, frames, height, width, device=device) * 2 - 1
    return video, torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, device=device)


def errors(report: Report, vae: WanVAE) -> None:
    """Both ways in the VAE's dtype against float32."""
    exact = random_vae(vae.config, report.device, torch.float32)
    exact.model.load_state_dict({name: tensor.float() for name, tensor in vae.model.state_dict().items()})
    exact.channels_last = False
    video, latents = clip(SMALL, report.device)
    wanted = {"decode": exact.decode(latents), "encode": exact.encode(video)}
    rows: list[dict[str, str | int | float]] = []
    for name, one in both_ways(vae).items():
        made = {"decode": one.decode(latents), "encode": one.encode(video)}
        rows.append({"way": name, **{what: relative_l2(made[what], wanted[what]) for what in wanted}})
    report.table(f"Relative L2 against float32, {SMALL[0]} frames of {SMALL[2]} x {SMALL[1]}", rows)
    for what in wanted if report.device.type == "cuda" else ():
        report.goal(f"error of {what} over that of diffusers", float(rows[1][what]) / float(rows[0][what]), 1.0)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="timed calls of each way (%(default)s)")
    arguments = options.parse_args()
    report = Report("vae", "The VAE of one window", choose_device(arguments.small), arguments.small)
    device = report.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    vae = random_vae(SMALL_VAE if report.small else PUBLIC_VAE, device, dtype)
    video, latents = clip(SMALL if report.small else (FRAMES, HEIGHT, WIDTH), device)
    ways = both_ways(vae)
    small = random_small_decoder(DECODER_WIDTHS if report.small else PUBLIC_WIDTHS, device, dtype)
    work = {
        "decode": {
            name: functools.partial(one.decode, latents) for name, one in {**ways, SMALL_DECODER: small}.items()
        },
        "encode": {name: functools.partial(one.encode, video) for name, one in ways.items()},
        "encode the carried frames": {
            name: functools.partial(one.encode, video[:, :, :MOTION_FRAMES]) for name, one in ways.items()
        },
    }
    rows: list[dict[str, str | int | float]] = []
    for what, calls in work.items():
        peaks = {name: measured(call, device)[0] for name, call in calls.items()}  # warms up, too
        times = interleaved(calls, arguments.rounds, device)
        for name in calls:
            median = statistics.median(times[name])
            over = ratio(times, name, PLAIN)
            rows.append({"work": what, "way": name, "ms": median, f"over {PLAIN}": over, "peak, GiB": peaks[name]})
        if device.type == "cuda" and what in GOALS:
            report.goal(f"{what}, ms", statistics.median(times[OURS]), GOALS[what])
            report.goal(f"peak of {what} over that of diffusers", peaks[OURS] / peaks[PLAIN], 1.0)
    report.table(f"{video.shape[2]} frames of {video.shape[4]} x {video.shape[3]}, {str(dtype)[6:]}: medians", rows)
    errors(report, vae)
    return report.finish(arguments.json)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
