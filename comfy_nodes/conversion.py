"""IMAGE and LATENT values to what the library takes, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipeline.conditioning import Keyframes, keyframe_condition
from ..wanvideo.errors import InputError
from . import comfyui
from .models import VaeModel
from .types import ClipEmbeds, OneWindow, checked_image

Tiles = tuple[int, int, int, int]  # width, height, distance in x, distance in y


def tile_options(tiles: Tiles | None) -> dict[str, Any]:
    """Keywords for the VAE: square tiles of the larger side, with the overlap that the distances leave."""
    if tiles is None:
        return {"tiled": False}
    size = max(tiles[:2])
    overlap = size - min(tiles[2:])
    if overlap < 0:
        raise InputError(f"Tiles of {size} pixels at a distance of {min(tiles[2:])} leave gaps: set tile_stride below.")
    return {"tiled": True, "tile_size": size // 8 * 8, "tile_overlap": overlap // 8 * 8}


def to_video(images: Tensor) -> Tensor:
    """IMAGE [F, H, W, 3 or 4] in [0, 1] -> [1, 3, F, H, W] in [-1, 1]."""
    return (images[..., :3].float() * 2 - 1).movedim(-1, 0).unsqueeze(0)


def to_images(video: Tensor) -> Tensor:
    """[1, 3, F, H, W] in [-1, 1] -> IMAGE [F, H, W, 3] in [0, 1]."""
    return ((video[0].float().cpu() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0)


def covered(images: Tensor | None, height: int, width: int) -> Tensor | None:
    """IMAGE [N, h, w, 3] resized to cover the size, the center cut out: [N, 3, height, width] in [-1, 1]."""
    if images is None:
        return None
    pixels = checked_image(images)[..., :3].float().movedim(-1, 1) * 2 - 1
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    size = (max(height, round(pixels.shape[-2] * scale)), max(width, round(pixels.shape[-1] * scale)))
    if size != tuple(pixels.shape[-2:]):
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width].clamp(-1, 1)


def encode_frames(
    vae: VaeModel, images: Tensor, tiles: Tiles | None, *, noise: float, strength: float
) -> dict[str, Any]:
    """LATENT of IMAGE frames; the frames travel with it, for long videos that start from them."""
    images = checked_image(images)
    height, width = (int(side) // 16 * 16 for side in images.shape[1:3])
    if height < 16 or width < 16:
        raise InputError(f"Frames of {images.shape[2]} x {images.shape[1]} pixels are too small: 16 x 16 is the least.")
    frames = images[:, :height, :width]
    video = to_video(frames[: 1 + (len(frames) - 1) // 4 * 4])
    if noise > 0:
        video = video + noise * torch.randn(video.shape, generator=torch.Generator("cpu").manual_seed(0))
    latents = vae.encode(video, **tile_options(tiles)).cpu() * strength
    vae.unload()
    return {"samples": latents, "source_frames": frames}


def decode_latent(vae: VaeModel, samples: dict[str, Any], tiles: Tiles | None, normalization: str) -> Tensor:
    """IMAGE of a LATENT; frames that are decoded already pass through."""
    if samples.get("video") is not None:
        frames: Tensor = samples["video"]
        return frames
    with comfyui.ordinary_tensors():
        video = vae.decode(samples["samples"].float().cpu(), **tile_options(tiles))
    vae.unload()
    if normalization == "none":
        return video[0].float().permute(1, 2, 3, 0)
    if normalization == "minmax":
        least, most = video.min(), video.max()
        return ((video[0].float() - least) / (most - least).clamp_min(1e-6)).permute(1, 2, 3, 0)
    return to_images(video)


def frames_of(samples: dict[str, Any]) -> tuple[Tensor, str]:
    """(IMAGE, path) of a long video that the sampler has decoded."""
    if samples.get("video") is None:
        raise InputError("These samples hold no images, only latents: use InfiniteTalk Decode instead.")
    return samples["video"], str(samples.get("output_path", ""))


def check_keyframes(*, has_vae: bool, has_end: bool, end_is_last_frame: bool) -> None:
    """Raise InputError for what is missing, or not run here, in a window of given images."""
    if not has_vae:
        raise InputError("Images are encoded by the VAE: connect vae.")
    if has_end and not end_is_last_frame:
        raise InputError("end_image as a frame behind the video is not part of this pack: turn fun_or_fl2v_model on.")


def keyframe_window(
    vae: VaeModel | None,
    width: int,
    height: int,
    frames: int,
    *,
    start: Tensor | None,
    end: Tensor | None,
    start_strength: float,
    end_strength: float,
    noise: float,
    empty_noise: float,
    empty: Tensor | None,
    end_is_last_frame: bool,
    given: Tensor | None,
    tiled: bool,
    clip: ClipEmbeds | None,
) -> OneWindow:
    """A window that starts or ends with given images, encoded as the condition."""
    check_keyframes(has_vae=vae is not None, has_end=end is not None, end_is_last_frame=end_is_last_frame)
    assert vae is not None
    keys = Keyframes(
        start=covered(start, height, width),
        end=covered(end, height, width),
        empty=covered(empty, height, width),
        given=given,
        start_strength=start_strength,
        end_strength=end_strength,
        noise=noise,
        empty_noise=empty_noise,
    )
    with comfyui.ordinary_tensors():
        condition = keyframe_condition(vae, keys, frames, height, width, tiled=tiled).cpu()
    return OneWindow(width, height, frames, condition, clip)
