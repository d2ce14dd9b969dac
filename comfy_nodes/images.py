"""Images: what the video starts from, as the sampler takes it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..pipeline.bounds import check_numbers, check_window
from ..pipeline.windows import plan_windows
from ..wanvideo.errors import InputError
from .comfyui import advanced, io
from .conversion import check_keyframes, keyframe_window
from .models import VaeModel, check_combination, clip_embeds_of
from .sampling import frames_folder
from .schema import UNCONNECTED, ClipEmbedsType, ImageEmbedsType, WanVaeType, foreign, node_schema, reject_foreign
from .types import ClipEmbeds, LongVideo, OneWindow, checked_image

logger = logging.getLogger(__name__)

COLOR_MATCHES = [
    "disabled",
    "mkl",
    "hm",
    "reinhard",
    "mvgd",
    "hm-mvgd-hm",
    "hm-mkl-hm",
    "flashtalk",
]  # in the public order, and ours


def _size(input_id: str, default: int, largest: int) -> Any:
    return io.Int.Input(
        input_id,
        default=default,
        min=64,
        max=largest,
        step=8,
        tooltip=f"{input_id.capitalize()} of the video in pixels; rounded down to a multiple of 16.",
    )


class InfiniteTalkClipVisionEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkClipVisionEncode",
            "InfiniteTalk CLIP Vision Encode",
            "Describe one or two images with CLIP vision, for I2V models.",
            group="image",
            aliases=["clip vision encode", "image embeds", "CLIP 视觉编码"],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Load CLIP Vision or InfiniteTalk CLIP Vision Loader."),
                io.Image.Input("image_1", tooltip="The image."),
                io.Float.Input(
                    "strength_1", default=1.0, min=0.0, max=10.0, step=0.001, tooltip="Factor on the first image."
                ),
                io.Float.Input(
                    "strength_2", default=1.0, min=0.0, max=10.0, step=0.001, tooltip="Factor on the second image."
                ),
                io.Combo.Input(
                    "crop",
                    options=["center", "disabled"],
                    default="center",
                    tooltip="center: the middle square of the image. disabled: the whole image, squeezed.",
                ),
                io.Combo.Input(
                    "combine_embeds",
                    options=["average", "sum", "concat", "batch"],
                    default="average",
                    tooltip="How several images become one description.",
                ),
                io.Boolean.Input(
                    "force_offload", default=True, tooltip="Move the CLIP model to host memory when it is done."
                ),
                io.Image.Input("image_2", optional=True, tooltip="A second image to combine with the first."),
                io.Image.Input(
                    "negative_image", optional=True, tooltip="An image to move away from; needs cfg above 1."
                ),
                io.Int.Input(
                    "tiles",
                    default=0,
                    min=0,
                    max=16,
                    step=2,
                    optional=True,
                    tooltip="Also look at the image in this many rows and columns of tiles; 0 looks at the whole only.",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the tiles in the result; 0 is the whole image alone.",
                ),
            ],
            outputs=[
                ClipEmbedsType.Output(
                    display_name="image_embeds", tooltip="For InfiniteTalk Long Video or InfiniteTalk Image To Video."
                )
            ],
        )

    @classmethod
    def check_early(cls, combine_embeds: str | None = None, image_2: Any = UNCONNECTED) -> None:
        if combine_embeds is not None and image_2 is not UNCONNECTED:
            check_combination(combine_embeds)

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        image_1: torch.Tensor,
        strength_1: float,
        strength_2: float,
        crop: str,
        combine_embeds: str,
        force_offload: bool,
        image_2: torch.Tensor | None = None,
        negative_image: torch.Tensor | None = None,
        tiles: int = 0,
        ratio: float = 0.5,
    ) -> Any:
        embeds = clip_embeds_of(
            clip_vision,
            [(image_1, strength_1)] + ([] if image_2 is None else [(image_2, strength_2)]),
            negative=negative_image,
            crop=crop,
            combine=combine_embeds,
            tiles=tiles,
            tile_share=ratio,
            force_offload=force_offload,
        )
        return io.NodeOutput(embeds)


class InfiniteTalkLongVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkLongVideo",
            "InfiniteTalk Long Video",
            "A talking video of any length from an image (or a source video), made in windows that follow each other.",
            group="image",
            aliases=["infinitetalk", "multitalk", "long video", "talking head", "数字人", "长视频"],
            inputs=[
                WanVaeType.Input("vae", tooltip="From InfiniteTalk VAE Loader; it encodes and decodes every window."),
                _size("width", 832, 2048),
                _size("height", 480, 29048),
                io.Int.Input(
                    "frame_window_size",
                    default=81,
                    min=1,
                    max=10000,
                    step=4,
                    tooltip="Frames of one window, 4n + 1. The models were trained with 81.",
                ),
                io.Int.Input(
                    "motion_frame",
                    default=25,
                    min=1,
                    max=10000,
                    step=1,
                    tooltip="Frames that a window takes over from the one before, 4n + 1: 9 for InfiniteTalk, 25 for "
                    "MultiTalk. More is smoother and slower.",
                ),
                io.Boolean.Input(
                    "force_offload",
                    default=False,
                    tooltip="Move the video model out of GPU memory before each window is decoded: slower, needs less.",
                ),
                io.Combo.Input(
                    "colormatch",
                    options=COLOR_MATCHES,
                    default="disabled",
                    tooltip="Keep the colors of the image through a long video. reinhard: mean and contrast; mkl and "
                    "mvgd: how colors vary together too; hm: the whole distribution of each channel.",
                ),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The image, or all frames of a source video (dubbing). Resized and cut to the size.",
                ),
                io.Boolean.Input(
                    "tiled_vae", default=False, optional=True, tooltip="Encode and decode in tiles: slower, needs less."
                ),
                ClipEmbedsType.Input("clip_embeds", optional=True, tooltip="From InfiniteTalk CLIP Vision Encode."),
                io.Combo.Input(
                    "mode",
                    options=["auto", "multitalk", "infinitetalk", "flashtalk"],
                    default="auto",
                    optional=True,
                    tooltip="auto goes by the name of the adapter file. infinitetalk anchors every window to the "
                    "image, multitalk to the last frame of the window before. flashtalk is for that distilled model.",
                ),
                io.String.Input(
                    "output_path",
                    default="",
                    optional=True,
                    tooltip="A name in ComfyUI's output folder. With the ending .mp4 finished windows are appended to "
                    "that video with its sound as they come; without an ending their frames go into that folder. "
                    "Images then holds the last window only: for long videos.",
                ),
            ],
            outputs=[
                ImageEmbedsType.Output(display_name="image_embeds", tooltip="For InfiniteTalk Sampler."),
                io.String.Output(display_name="output_path", tooltip="The path as given."),
            ],
        )

    @classmethod
    def check_early(cls, frame_window_size: int | None = None, motion_frame: int | None = None) -> None:
        _check_windows(frame_window_size or motion_frame, motion_frame or 1)

    @classmethod
    def execute(
        cls,
        vae: VaeModel,
        width: int,
        height: int,
        frame_window_size: int,
        motion_frame: int,
        force_offload: bool,
        colormatch: str,
        start_image: torch.Tensor | None = None,
        tiled_vae: bool = False,
        clip_embeds: ClipEmbeds | None = None,
        mode: str = "auto",
        output_path: str = "",
    ) -> Any:
        check_numbers(width=width, height=height)
        check_window(frame_window_size, width, height)
        asked, motion_frame = motion_frame, _nearest_length(motion_frame)
        if motion_frame != asked:
            logger.warning("motion_frame %d is not 4n + 1, which the VAE needs: %d is used.", asked, motion_frame)
        _check_windows(frame_window_size, motion_frame)  # so that its message is on this node, not on the sampler
        frames_folder(output_path.strip())
        vae.check_encodes()
        plan = LongVideo(
            vae=vae,
            width=width // 16 * 16,
            height=height // 16 * 16,
            frames=frame_window_size,
            motion_frames=motion_frame,
            start_images=None if start_image is None else checked_image(start_image),
            clip=clip_embeds,
            mode=mode,
            color_match=colormatch,
            tiled=tiled_vae,
            offload_between=force_offload,
            output_path=output_path.strip(),
        )
        return io.NodeOutput(plan, output_path)


def _nearest_length(frames: int) -> int:
    """The number of frames nearest to `frames` that the VAE knows, 4n + 1."""
    return max(1, 4 * round((frames - 1) / 4) + 1)


def _check_windows(frames: int | None, motion_frames: int) -> None:
    """Raise InputError for windows of `frames` that follow each other by none; None is not known yet."""
    if frames is not None:
        plan_windows(1, frames, _nearest_length(motion_frames))


class InfiniteTalkEmptyVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkEmptyVideo",
            "InfiniteTalk Empty Video",
            "Size and length of a video that starts from no image (text to video).",
            group="image",
            aliases=["t2v", "text to video", "empty latent", "文生视频"],
            inputs=[
                _size("width", 832, 8096),
                _size("height", 480, 8096),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=10000,
                    step=4,
                    tooltip="Length of the video in frames; rounded down to 4n + 1.",
                ),
                ImageEmbedsType.Input(
                    "control_embeds", optional=True, tooltip="For control models, which this pack does not run."
                ),
                io.Latent.Input(
                    "extra_latents", optional=True, tooltip="For models with reference latents, not run by this pack."
                ),
            ],
            outputs=[ImageEmbedsType.Output(display_name="image_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def check_early(cls, control_embeds: Any = UNCONNECTED, extra_latents: Any = UNCONNECTED) -> None:
        _reject_control(control_embeds=control_embeds, extra_latents=extra_latents)

    @classmethod
    def execute(
        cls, width: int, height: int, num_frames: int, control_embeds: Any = None, extra_latents: Any = None
    ) -> Any:
        _reject_control(**_connected(control_embeds=control_embeds, extra_latents=extra_latents))
        check_window(num_frames, width, height)
        return io.NodeOutput(OneWindow(width // 16 * 16, height // 16 * 16, (num_frames - 1) // 4 * 4 + 1))


class InfiniteTalkImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkImageToVideo",
            "InfiniteTalk Image To Video",
            "One window of video that starts from an image, ends in an image, or both.",
            group="image",
            aliases=["i2v", "image to video", "start end frame", "图生视频", "首尾帧"],
            inputs=[
                _size("width", 832, 8096),
                _size("height", 480, 8096),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=10000,
                    step=4,
                    tooltip="Length of the video in frames; rounded down to 4n + 1.",
                ),
                io.Float.Input(
                    "noise_aug_strength",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Noise added to the images: more motion, less likeness.",
                ),
                io.Float.Input(
                    "start_latent_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Factor on the latents of the first image; below 1 gives more motion.",
                ),
                io.Float.Input(
                    "end_latent_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="Factor on the latents of the last image.",
                ),
                io.Boolean.Input("force_offload", default=True, tooltip="Move the VAE to host memory when it is done."),
                WanVaeType.Input(
                    "vae", optional=True, tooltip="From InfiniteTalk VAE Loader; needed where an image is."
                ),
                ClipEmbedsType.Input("clip_embeds", optional=True, tooltip="From InfiniteTalk CLIP Vision Encode."),
                io.Image.Input("start_image", optional=True, tooltip="The first frame, or several first frames."),
                io.Image.Input("end_image", optional=True, tooltip="The last frame."),
                ImageEmbedsType.Input(
                    "control_embeds", optional=True, tooltip="For control models, which this pack does not run."
                ),
                io.Boolean.Input(
                    "fun_or_fl2v_model",
                    default=True,
                    optional=True,
                    tooltip="On for first-last-frame models: the last image counts as the last frame. "
                    "Off: it gets a latent frame of its own behind the video, as plain I2V models want it.",
                ),
                io.Mask.Input(
                    "temporal_mask",
                    optional=True,
                    tooltip="Which frames are given, one mask per frame; instead of first and last.",
                ),
                io.Latent.Input(
                    "extra_latents", optional=True, tooltip="For models with reference latents, not run by this pack."
                ),
                io.Boolean.Input(
                    "tiled_vae", default=False, optional=True, tooltip="Encode in tiles: slower, needs less memory."
                ),
                advanced(foreign("ADD_COND_LATENTS", "add_cond_latents", "Not supported; leave unconnected.")),
                io.Float.Input(
                    "augment_empty_frames",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="Noise in the frames that no image fills: more motion.",
                ),
                io.Image.Input(
                    "empty_frame_pad_image",
                    optional=True,
                    tooltip="What the frames that no image fills are filled with; gray without it.",
                ),
            ],
            outputs=[ImageEmbedsType.Output(display_name="image_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def check_early(
        cls,
        fun_or_fl2v_model: bool | None = True,
        vae: Any = UNCONNECTED,
        end_image: Any = UNCONNECTED,
        control_embeds: Any = UNCONNECTED,
        extra_latents: Any = UNCONNECTED,
    ) -> None:
        _reject_control(control_embeds=control_embeds, extra_latents=extra_latents)
        check_keyframes(
            has_vae=vae is not UNCONNECTED,
            has_end=end_image is not UNCONNECTED,
            end_is_last_frame=fun_or_fl2v_model is not False,
        )

    @classmethod
    def execute(
        cls,
        width: int,
        height: int,
        num_frames: int,
        noise_aug_strength: float,
        start_latent_strength: float,
        end_latent_strength: float,
        force_offload: bool,
        vae: VaeModel | None = None,
        clip_embeds: ClipEmbeds | None = None,
        start_image: torch.Tensor | None = None,
        end_image: torch.Tensor | None = None,
        control_embeds: Any = None,
        fun_or_fl2v_model: bool = True,
        temporal_mask: torch.Tensor | None = None,
        extra_latents: Any = None,
        tiled_vae: bool = False,
        augment_empty_frames: float = 0.0,
        empty_frame_pad_image: torch.Tensor | None = None,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        _reject_control(**_connected(control_embeds=control_embeds, extra_latents=extra_latents))
        check_window(num_frames, width, height)
        window = keyframe_window(
            vae,
            width // 16 * 16,
            height // 16 * 16,
            (num_frames - 1) // 4 * 4 + 1,
            start=start_image,
            end=end_image,
            start_strength=start_latent_strength,
            end_strength=end_latent_strength,
            noise=noise_aug_strength,
            empty_noise=augment_empty_frames,
            empty=empty_frame_pad_image,
            end_is_last_frame=fun_or_fl2v_model,
            given=temporal_mask,
            tiled=tiled_vae,
            clip=clip_embeds,
        )
        if force_offload and vae is not None:
            vae.unload()
        return io.NodeOutput(window)


def _connected(**sockets: Any) -> dict[str, Any]:
    """The sockets that something is connected to, when it is known."""
    return {name: value for name, value in sockets.items() if value is not None}


def _reject_control(**sockets: Any) -> None:
    for name, value in sockets.items():
        if value is not UNCONNECTED:
            raise InputError(f"{name} is for control and reference models: not part of this pack, disconnect {name}.")
