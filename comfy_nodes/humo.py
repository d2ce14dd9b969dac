"""HuMo's nodes: the Whisper encoder of the speech, and what the video is to show."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..media.images import load_image, pad_image
from ..pipeline.bounds import check_window
from ..pipeline.humo import FORMULAS
from ..wanvideo.errors import InputError
from . import comfyui
from .comfyui import io
from .loaders import load_device_input
from .models import VaeModel, WhisperModel, check_file
from .schema import ImageEmbedsType, WanVaeType, WhisperType, node_schema
from .types import HuMoVideo, checked_image


class InfiniteTalkWhisperLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkWhisperLoader",
            "InfiniteTalk Whisper Loader",
            "Load the Whisper encoder, which turns speech into the features that HuMo reads.",
            group="loaders",
            aliases=["whisper", "humo", "audio encoder", "语音编码器"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=comfyui.model_files("whisper"),
                    tooltip="The encoder of whisper-large-v3 in ComfyUI/models/audio_encoders.",
                ),
                io.Combo.Input(
                    "base_precision",
                    options=["fp32", "bf16", "fp16"],
                    default="fp16",
                    tooltip="What the model computes in.",
                ),
                load_device_input("main_device"),
            ],
            outputs=[WhisperType.Output(display_name="whisper_model", tooltip="For InfiniteTalk HuMo.")],
        )

    @classmethod
    def check_early(cls, model: str | None = None) -> None:
        check_file("whisper", model, "Whisper model")

    @classmethod
    def execute(cls, model: str, base_precision: str, load_device: str) -> Any:
        path = comfyui.model_path("whisper", model)
        return io.NodeOutput(WhisperModel.load(path, base_precision, keep_on_device=load_device == "main_device"))


def _share(input_id: str, default: float, tooltip: str) -> Any:
    return io.Float.Input(input_id, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _side(input_id: str, default: int) -> Any:
    tooltip = f"{input_id.capitalize()} of the video in pixels; rounded down to a multiple of 16."
    return io.Int.Input(input_id, default=default, min=64, max=4096, step=16, tooltip=tooltip)


class InfiniteTalkHuMo(io.ComfyNode):
    PUBLIC: ClassVar = {"guidance": "wrapper"}
    """What the alias under the wrapper's id takes: workflows that were saved with it do not state it."""

    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkHuMo",
            "InfiniteTalk HuMo",
            "What a HuMo model is to show: reference images, speech, size and length. For InfiniteTalk Sampler.",
            group="image",
            aliases=["humo", "reference to video", "参考图生成视频"],
            inputs=[
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=-1,
                    max=10000,
                    step=1,
                    tooltip="Length in frames, 25 a second; rounded down to 4n + 1. -1: as long as the recording. HuMo "
                    "was trained on 97.",
                ),
                _side("width", 832),
                _side("height", 480),
                io.Float.Input(
                    "audio_scale",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the speech moves mouth and face.",
                ),
                io.Float.Input(
                    "audio_cfg_scale",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Guidance by the speech: 5.5 with the 17B model, 7.5 with the 1.7B; 1 with a step LoRA.",
                ),
                _share("audio_start_percent", 0.0, "Part of the steps before which the speech is silent."),
                _share("audio_end_percent", 1.0, "Part of the steps behind which the speech is silent."),
                WhisperType.Input("whisper_model", optional=True, tooltip="From InfiniteTalk Whisper Loader."),
                WanVaeType.Input("vae", optional=True, tooltip="From InfiniteTalk VAE Loader."),
                io.Image.Input(
                    "reference_images",
                    optional=True,
                    tooltip="Persons, clothes or things; each is fitted whole onto white.",
                ),
                io.Audio.Input("audio", optional=True, tooltip="The speech; without it the video is silent."),
                io.Boolean.Input(
                    "tiled_vae", default=False, optional=True, tooltip="Encode in tiles: slower, less GPU memory."
                ),
                io.Combo.Input(
                    "guidance",
                    options=list(FORMULAS),
                    default="official",
                    optional=True,
                    tooltip="official: the formula and the noise levels of HuMo's release. wrapper: those of "
                    "ComfyUI-WanVideoWrapper, for workflows made with it.",
                ),
            ],
            outputs=[ImageEmbedsType.Output(display_name="image_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        num_frames: int,
        width: int,
        height: int,
        audio_scale: float,
        audio_cfg_scale: float,
        audio_start_percent: float,
        audio_end_percent: float,
        whisper_model: WhisperModel | None = None,
        vae: VaeModel | None = None,
        reference_images: torch.Tensor | None = None,
        audio: dict[str, Any] | None = None,
        tiled_vae: bool = False,
        guidance: str = "official",
    ) -> Any:
        if audio is not None and whisper_model is None:
            raise InputError(
                "A recording needs the Whisper encoder: connect whisper_model (InfiniteTalk Whisper Loader)."
            )
        if audio_start_percent > audio_end_percent:
            raise InputError("audio_start_percent lies behind audio_end_percent: set it lower.")
        features = None if audio is None or whisper_model is None else whisper_model.embed(audio)
        if num_frames < 1:
            if features is None:
                raise InputError("num_frames is as long as the recording, and there is none: connect audio, or set it.")
            num_frames = len(features)
        frames = (num_frames - 1) // 4 * 4 + 1
        width, height = width // 16 * 16, height // 16 * 16
        check_window(frames, width, height)
        images = () if reference_images is None else checked_image(reference_images)[..., :3].float().clamp(0, 1).cpu()
        if reference_images is not None and vae is None:
            raise InputError("Reference images are encoded by the VAE: connect vae (InfiniteTalk VAE Loader).")
        return io.NodeOutput(
            HuMoVideo(
                vae=vae,
                width=width,
                height=height,
                frames=frames,
                images=tuple(pad_image(load_image(image), width, height) for image in images),
                audio=features,
                audio_scale=audio_scale,
                audio_cfg=audio_cfg_scale,
                span=(audio_start_percent, audio_end_percent),
                tiled=tiled_vae,
                guidance=guidance,
            )
        )
