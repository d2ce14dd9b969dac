"""GPU memory of encoding and decoding: the Wan2.1 VAE at its public size, whole and in tiles.

    python -m benchmarks.vram [--json F]

Both run one latent frame at a time, and what they make is collected in host memory here, so that the peaks do not grow
with the clip. Random weights; peaks include the weights. Run from the root of the repository.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from wanvideo_infinitetalk.wanvideo.encoders.vae import VaeConfig, WanVAE
from wanvideo_infinitetalk.wanvideo.runtime.timing import per_call

from .common import Report, begin, parser

PUBLIC_VAE = VaeConfig(base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal=(False, True, True))
SMALL_VAE = VaeConfig(base_dim=8, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal=(False, True, True))

SIZES = ((480, 832), (720, 1280))
FRAMES = 21
SMALL_FRAMES = 5
TILES = (None, 256, 128)
LENGTHS = (9, 21, 81)


def random_vae(config: VaeConfig, device: torch.device, dtype: torch.dtype) -> WanVAE:
    with torch.device(device):
        model: Any = AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal),
        )
    return WanVAE(model.to(dtype).requires_grad_(False).eval(), config)


def measured(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(peak of the memory in GiB, milliseconds) of one call."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    spent = per_call(call, device)
    return (torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0), spent


def tables(report: Report, vae: WanVAE, sizes: Sequence[tuple[int, int]], tiles: Sequence[int | None]) -> None:
    """Encode and decode at every size, whole and in tiles."""
    frames = SMALL_FRAMES if report.small else FRAMES
    rows = []
    for height, width in sizes:
        video = torch.rand(1, 3, frames, height, width) * 2 - 1
        latents = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
        for tile in tiles:
            how: dict[str, Any] = {"output_device": "cpu"}
            if tile is not None:
                how |= {"tiled": True, "tile_size": tile, "tile_overlap": tile // 4}
            row: dict[str, str | int | float] = {"size": f"{width} x {height}", "tiles": str(tile or "none")}
            for name, call in (
                ("encode", functools.partial(vae.encode, video, **how)),
                ("decode", functools.partial(vae.decode, latents, **how)),
            ):
                peak, spent = measured(call, report.device)
                row |= {f"{name}, GiB": peak, f"{name}, s": spent / 1e3}
            rows.append(row)
    report.table(f"Wan2.1 VAE, {str(vae.dtype).removeprefix('torch.')}, {frames} frames", rows)


def lengths(report: Report, vae: WanVAE, size: tuple[int, int]) -> None:
    """Decoding clips of several lengths: the peak must not grow with them."""
    rows: list[dict[str, str | int | float]] = []
    for frames in LENGTHS[:2] if report.small else LENGTHS:
        latents = torch.randn(1, 16, 1 + (frames - 1) // 4, size[0] // 8, size[1] // 8)
        peak, spent = measured(functools.partial(vae.decode, latents, output_device="cpu"), report.device)
        rows.append({"frames": frames, "decode, GiB": peak, "decode, s": spent / 1e3})
    report.table(f"Length of the clip, {size[1]} x {size[0]}, no tiles", rows)
    if report.device.type == "cuda":
        first, last = (float(rows[i]["decode, GiB"]) for i in (0, -1))
        report.goal(f"peak of {rows[-1]['frames']} frames over that of {rows[0]['frames']}", last / first, 1.02)


def main() -> int:
    report, arguments = begin(parser(__doc__), "vram", "Memory of the VAE")
    small, device = report.small, report.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    vae = random_vae(SMALL_VAE if small else PUBLIC_VAE, device, dtype)
    sizes: Sequence[tuple[int, int]] = ((64, 96),) if small else SIZES
    # Loads the libraries, whose time would fall on the first row.
    vae.decode(vae.encode(torch.zeros(1, 3, 5, 64, 96, device=device)))
    tables(report, vae, sizes, (None, 32) if small else TILES)
    lengths(report, vae, sizes[0])
    return report.finish(arguments.json)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
