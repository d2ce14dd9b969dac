"""GPU memory of encoding and decoding: the Wan2.1 VAE at its public size, whole and in tiles.

    python -m benchmarks.vram [--json F]

Both run one latent frame at a time, so the figures do not depend on the length of the clip. Random weights; peaks
include the weights. Run from the root of the repository.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from wanvideo_infinitetalk.wanvideo.vae import VaeConfig, WanVAE

from .common import Report, choose_device, parser, timed

PUBLIC_VAE = VaeConfig(base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal=(False, True, True))
SMALL_VAE = VaeConfig(base_dim=8, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal=(False, True, True))

SIZES = ((480, 832), (720, 1280))
FRAMES = 21
TILES = (None, 256, 128)


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


def main() -> int:
    arguments = parser(__doc__).parse_args()
    small = arguments.small
    report = Report("vram", "Memory of the VAE", choose_device(small), small)
    device = report.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    vae = random_vae(SMALL_VAE if small else PUBLIC_VAE, device, dtype)
    rows = []
    for height, width in ((64, 96),) if small else SIZES:
        frames = 5 if small else FRAMES
        video = torch.rand(1, 3, frames, height, width) * 2 - 1
        latents = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
        for tile in (None, 32) if small else TILES:
            how = {"tiled": False} if tile is None else {"tiled": True, "tile_size": tile, "tile_overlap": tile // 4}
            row: dict[str, str | int | float] = {"size": f"{width} x {height}", "tiles": str(tile or "none")}
            for name, call in (
                ("encode", lambda x=video, h=how: vae.encode(x, **h, output_device="cpu")),
                ("decode", lambda x=latents, h=how: vae.decode(x, **h, output_device="cpu")),
            ):
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                spent = timed(call, device)
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
                row |= {f"{name}, GiB": peak / 2**30, f"{name}, s per 21 frames": spent / 1e3}
            rows.append(row)
    report.table(f"Wan2.1 VAE, {str(dtype).removeprefix('torch.')}, {FRAMES} frames", rows)
    return report.finish(arguments.json)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
