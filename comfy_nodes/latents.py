"""Between pixels and latents."""

from __future__ import annotations

from typing import Any

import torch

from ..wanvideo.errors import InputError
from .comfyui import advanced, io
from .conversion import Tiles, decode_latent, encode_frames, frames_of, tile_options
from .models import VaeModel
from .schema import UNCONNECTED, WanVaeType, node_schema

_NO_MASK = "Masked sampling is not part of this pack: disconnect mask."


def _tile(input_id: str, default: int, least: int, most: int, step: int, tooltip: str) -> Any:
    return io.Int.Input(input_id, default=default, min=least, max=most, step=step, tooltip=tooltip)


def _tiles(
    enable_vae_tiling: bool | None, tile_x: int | None, tile_y: int | None, stride_x: int | None, stride_y: int | None
) -> Tiles | None:
    """The tiles that a node's widgets name; None: it works without, or they are not known yet."""
    tiles = (tile_x, tile_y, stride_x, stride_y)
    if not enable_vae_tiling or None in tiles:
        return None
    return tile_x or 0, tile_y or 0, stride_x or 0, stride_y or 0


class InfiniteTalkEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkEncode",
            "InfiniteTalk Encode",
            "Encode the frames of a video into latents, for video-to-video.",
            group="latents",
            aliases=["vae encode", "v2v", "video to video", "VAE 编码"],
            inputs=[
                WanVaeType.Input("vae", tooltip="From InfiniteTalk VAE Loader."),
                io.Image.Input("image", tooltip="The frames; sizes are cut to multiples of 16, the length to 4n + 1."),
                io.Boolean.Input(
                    "enable_vae_tiling", default=False, tooltip="Work in tiles: slower, with less memory."
                ),
                _tile("tile_x", 272, 64, 2048, 1, "Width of a tile in pixels."),
                _tile("tile_y", 272, 64, 2048, 1, "Height of a tile in pixels."),
                _tile("tile_stride_x", 144, 32, 2048, 32, "Distance of tiles in x; what is left of tile_x overlaps."),
                _tile("tile_stride_y", 128, 32, 2048, 32, "Distance of tiles in y; what is left of tile_y overlaps."),
                io.Float.Input(
                    "noise_aug_strength",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    optional=True,
                    tooltip="Noise added to the frames before they are encoded.",
                ),
                io.Float.Input(
                    "latent_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    optional=True,
                    tooltip="Factor on the latents.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="For masked sampling, which this pack does not run."),
            ],
            outputs=[io.Latent.Output(display_name="samples", tooltip="Latents of the video.")],
        )

    @classmethod
    def check_early(
        cls,
        enable_vae_tiling: bool | None = False,
        tile_x: int | None = None,
        tile_y: int | None = None,
        tile_stride_x: int | None = None,
        tile_stride_y: int | None = None,
        mask: Any = UNCONNECTED,
    ) -> None:
        if mask is not UNCONNECTED:
            raise InputError(_NO_MASK)
        tile_options(_tiles(enable_vae_tiling, tile_x, tile_y, tile_stride_x, tile_stride_y))

    @classmethod
    def execute(
        cls,
        vae: VaeModel,
        image: torch.Tensor,
        enable_vae_tiling: bool,
        tile_x: int,
        tile_y: int,
        tile_stride_x: int,
        tile_stride_y: int,
        noise_aug_strength: float = 0.0,
        latent_strength: float = 1.0,
        mask: torch.Tensor | None = None,
    ) -> Any:
        if mask is not None:
            raise InputError(_NO_MASK)
        tiles = _tiles(enable_vae_tiling, tile_x, tile_y, tile_stride_x, tile_stride_y)
        latent = encode_frames(vae, image, tiles, noise=noise_aug_strength, strength=latent_strength)
        return io.NodeOutput(latent)


class InfiniteTalkDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkDecode",
            "InfiniteTalk Decode",
            "Decode latents into images. Videos made in windows come decoded already and pass through. "
            "When GPU memory runs out it tries again in tiles and says so.",
            group="latents",
            aliases=["vae decode", "VAE 解码"],
            inputs=[
                WanVaeType.Input("vae", tooltip="From InfiniteTalk VAE Loader or InfiniteTalk Small Decoder Loader."),
                io.Latent.Input("samples", tooltip="From InfiniteTalk Sampler."),
                io.Boolean.Input(
                    "enable_vae_tiling", default=False, tooltip="Work in tiles: slower, with less memory."
                ),
                _tile("tile_x", 272, 40, 2048, 8, "Width of a tile in pixels."),
                _tile("tile_y", 272, 40, 2048, 8, "Height of a tile in pixels."),
                _tile("tile_stride_x", 144, 32, 2040, 8, "Distance of tiles in x; what is left of tile_x overlaps."),
                _tile("tile_stride_y", 128, 32, 2040, 8, "Distance of tiles in y; what is left of tile_y overlaps."),
                advanced(
                    io.Combo.Input(
                        "normalization",
                        options=["default", "minmax", "none"],
                        optional=True,
                        tooltip="How decoded values become colors. default: -1 to 1 becomes 0 to 1. minmax: the least "
                        "becomes 0 and the most 1. none: values as they are.",
                    )
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames.")],
        )

    @classmethod
    def check_early(
        cls,
        enable_vae_tiling: bool | None = False,
        tile_x: int | None = None,
        tile_y: int | None = None,
        tile_stride_x: int | None = None,
        tile_stride_y: int | None = None,
    ) -> None:
        tile_options(_tiles(enable_vae_tiling, tile_x, tile_y, tile_stride_x, tile_stride_y))

    @classmethod
    def execute(
        cls,
        vae: VaeModel,
        samples: dict[str, Any],
        enable_vae_tiling: bool,
        tile_x: int,
        tile_y: int,
        tile_stride_x: int,
        tile_stride_y: int,
        normalization: str = "default",
    ) -> Any:
        tiles = _tiles(enable_vae_tiling, tile_x, tile_y, tile_stride_x, tile_stride_y)
        return io.NodeOutput(decode_latent(vae, samples, tiles, normalization))


class InfiniteTalkImagesFromSamples(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkImagesFromSamples",
            "InfiniteTalk Images From Samples",
            "The images of a video that the sampler made in windows and has decoded already.",
            group="latents",
            aliases=["images from samples", "infinitetalk output", "取出图像"],
            inputs=[io.Latent.Input("samples", tooltip="From InfiniteTalk Sampler after InfiniteTalk Long Video.")],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames."),
                io.String.Output(
                    display_name="output_path",
                    tooltip="The video file or the folder of frames, where one was asked for.",
                ),
            ],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> Any:
        return io.NodeOutput(*frames_of(samples))
