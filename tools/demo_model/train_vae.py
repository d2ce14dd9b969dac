"""Train the demo's small Wan VAE on drawn faces.

`python -m wanvideo_infinitetalk.tools.demo_model.train_vae OUT_FOLDER [--resume] [--finish]`

Loss: absolute error of pixels, of their differences in space and of those in time, heavier on mouths and eyes. The
decoder sees the latents with a little noise, and large latents cost a little; both together keep the latents smooth and
near unit variance, which the transformer that is trained on them needs. No adversarial and no perceptual part: drawn
faces have sharp edges and no texture.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...cli import tiny_models as tiny
from ...wanvideo.encoders.vae import WanVAE, diffusers_names
from .faces import Faces, Motion, draw, mouth_boxes, random_faces, random_motion
from .training import Schedule, Trainer, averaged_state, training_parser
from .whole_clip import decode, encode

logger = logging.getLogger(__name__)

SIZE = 128
CLIPS = ((17, SIZE), (81, SIZE), (17, 2 * SIZE), (81, SIZE))
"""(frames, width) of one batch after the other. The decoder looks back over 22 latent frames: a clip must be longer
than that for the network to see in training what it sees in the middle of a video."""
NOISE = 0.12
"""Standard deviation of the noise on the latents, relative to their own."""


def new_vae(dim: int, device: torch.device | str) -> WanVAE:
    """An untrained VAE of `dim` base channels whose weights want gradients."""
    vae = WanVAE.from_state_dict(tiny.vae_weights(dim), device=device)
    vae.model.requires_grad_(True)
    vae.latents_mean, vae.latents_std = vae.latents_mean.to(device), vae.latents_std.to(device)
    return vae


def public_state(vae: WanVAE, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` (names of `vae.model`) under the public names."""
    names = tiny.vae_weights(vae.config.base_dim)
    return {name: weights[diffusers_names(name, vae.config.num_res_blocks)] for name in names}


@torch.no_grad()
def whiten(state: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Public weights whose latents have, per channel, mean 0 and deviation 1 where they had `mean` and `std` [16].

    The 1x1x1 convolutions at the border of the latents take the change; what is decoded stays the same.
    """
    from diffusers import AutoencoderKLWan

    public: Any = AutoencoderKLWan()  # its constants stand in every Wan pipeline
    center, spread = (torch.tensor(x).to(mean) for x in (public.config.latents_mean, public.config.latents_std))
    out = dict(state)
    # public latents are spread * z + center; they become spread * (z - mean) / std + center
    factor = 1 / std
    summand = center - (spread * mean + center) * factor
    weight, bias = state["conv1.weight"].clone(), state["conv1.bias"].clone()
    weight[:16] *= factor[:, None, None, None, None]
    bias[:16] = bias[:16] * factor + summand
    out["conv1.weight"], out["conv1.bias"] = weight, bias
    into = state["conv2.weight"]
    out["conv2.weight"] = into * std[None, :, None, None, None]
    out["conv2.bias"] = state["conv2.bias"] - (into[:, :, 0, 0, 0] * (summand * std)[None]).sum(1)
    return out


def scenes(
    count: int, frames: int, width: int, generator: torch.Generator, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Videos [count, 3, frames, SIZE, width] and weights of the loss [count, 1, frames, SIZE, width].

    The first frame counts three times: it stands alone in its latent, as every image does.
    """
    middles = [0.0] if width == SIZE else [-1.0, 1.0]
    faces: list[Faces] = []
    motions: list[Motion] = []
    weight = torch.ones(count, 1, 1, SIZE, width)
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for middle in middles:
        face = random_faces(count, generator, middle)
        start = torch.rand(count, 1, generator=generator)
        walk = torch.cumsum(0.22 * torch.randn(count, frames, generator=generator), 1) + start
        opening = (2 * (walk / 2 - torch.round(walk / 2))).abs()  # to and fro between 0 and 1
        opening = opening * (torch.rand(count, 1, generator=generator) < 0.9)
        spread = torch.rand(count, 1, generator=generator).expand(-1, frames)
        faces.append(face.to(device))
        motions.append(random_motion(opening, spread, generator).to(device))
        box = mouth_boxes(face, SIZE, width)
        inside = (x > box[:, 0, None, None]) & (x < box[:, 2, None, None])
        eyes = box[:, 1, None, None] - (face.size * 0.45 * SIZE / 2)[:, None, None]
        inside &= (y > eyes) & (y < box[:, 3, None, None])
        weight[:, 0, 0] += 4.0 * inside
        weight[:, 0, 0] += 4.0 * (inside & (y > box[:, 1, None, None]))
    video = draw(faces, motions, SIZE, width)
    gray = torch.rand(count, generator=generator) < 0.05  # what the loop appends to an image
    video[gray.to(device), :, 1:] = 0
    weight = weight.repeat(1, 1, frames, 1, 1)
    weight[:, :, 0] *= 3
    return video, weight.to(device)


def make_loss(vae: WanVAE) -> nn.Module:
    """(video, weight) -> scalar."""

    class Loss(nn.Module):
        def forward(self, video: Tensor, weight: Tensor) -> Tensor:
            latents = encode(vae, video)
            seen = decode(vae, latents + NOISE * torch.randn_like(latents))
            error = seen - video
            weight = weight / weight.mean()
            pixels = (weight * error.abs()).mean()
            edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
            edges = edges + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
            time_ = (weight[:, :, 1:] * error.diff(dim=2).abs()).mean()
            return pixels + 0.5 * edges + 0.5 * time_ + 1e-3 * latents.square().mean()

    return Loss()


@torch.no_grad()
def psnr(vae: WanVAE, generator: torch.Generator, device: torch.device | str) -> tuple[float, float, float]:
    """(PSNR of all pixels, of mouths and eyes, deviation of the latents) on fresh faces, dB."""
    video, weight = scenes(4, 81, SIZE, generator, device)
    keep = (video[:, :, -1] != 0).flatten(1).any(1)
    video, weight = video[keep], weight[keep]
    latents = encode(vae, video)
    error = (decode(vae, latents).clamp(-1, 1) - video).square()
    heavy = (weight > 3).expand_as(error) & (torch.arange(error.shape[2], device=error.device) > 0).view(-1, 1, 1)
    everything, mouths = (float(-10 * torch.log10(e.mean() / 4)) for e in (error, error[heavy]))
    return everything, mouths, float(latents.std())


def main() -> None:
    parser = training_parser(__doc__, lr=2e-3)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--batch", type=int, default=162, help="frames of SIZE x SIZE in a batch")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


def train(given: argparse.Namespace) -> None:
    began = time.monotonic()
    torch.manual_seed(given.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    generator = torch.Generator().manual_seed(given.seed + 1)
    vae = new_vae(given.dim, given.device)
    trainer = Trainer(vae.model, make_loss(vae), average=0.998, capture=not given.no_capture)
    if given.resume:
        trainer.load(given.out)
        generator.manual_seed(int(time.time()))  # other faces than before
    plan = Schedule(given.lr, given.steps, given.minutes, given.finish)
    step = 0
    while (progress := plan.progress(step, began)) < 1:
        frames, width = CLIPS[step % len(CLIPS)]
        count = max(1, given.batch * SIZE // (frames * width))
        batch = scenes(count, frames, width, generator, given.device)
        loss = trainer.step(plan.rate(step, progress), *batch)
        if step % 500 == 0:
            everything, heavy, spread = psnr(vae, generator, given.device)
            minutes = (time.monotonic() - began) / 60
            logger.info(
                "%.1f min, step %d: loss %.4f, PSNR %.1f dB, mouths and eyes %.1f dB, latents' deviation %.2f",
                *(minutes, step, loss.item(), everything, heavy, spread),
            )
        step += 1
    trainer.save(given.out)
    logger.info("%d steps, %.1f min", step, (time.monotonic() - began) / 60)


def load_trained(folder: Path, dim: int, device: torch.device | str) -> WanVAE:
    """The averaged weights of a checkpoint as a VAE."""
    vae = new_vae(dim, device)
    vae.model.load_state_dict(averaged_state(folder))
    vae.model.requires_grad_(False)
    return vae


@torch.no_grad()
def load_whitened(folder: Path, dim: int, device: torch.device | str) -> WanVAE:
    """The trained VAE with latents of mean 0 and deviation 1 per channel on drawn faces."""
    return WanVAE.from_state_dict(whitened_state(folder, dim, device), device=device)


@torch.no_grad()
def whitened_state(folder: Path, dim: int, device: torch.device | str) -> dict[str, Tensor]:
    """Its tensors under the public names, float32."""
    vae = load_trained(folder, dim, device)
    generator = torch.Generator().manual_seed(123)
    latents = torch.cat([vae.encode(scenes(2, 81, SIZE, generator, device)[0]) for _ in range(8)])
    state = public_state(vae, dict(vae.model.named_parameters()))
    return whiten(state, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))


if __name__ == "__main__":
    main()
