"""Loading models: the DiT with its adapter, the VAE, the text encoder, CLIP vision, wav2vec2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..fp8_optimization import QUANTIZATIONS
from ..wanvideo.checkpoints.dit import DitFiles
from ..wanvideo.checkpoints.lora import LoraSpec
from ..wanvideo.encoders.text import TEXT_QUANTIZATIONS
from ..wanvideo.errors import InputError
from ..wanvideo.modules.attention import canonical_mode
from ..wanvideo.runtime.compilation import CompileSettings
from ..wanvideo.runtime.offload import BlockSwap
from ..wanvideo.runtime.precision import PRECISIONS
from . import comfyui
from .comfyui import io
from .models import HEADERS, SpeechModel, TextModel, VaeModel, VideoModel, VisionModel, check_file
from .schema import (
    AdapterType,
    BlockSwapType,
    CompileType,
    LoraType,
    TextEncoderType,
    VramManagementType,
    WanModelType,
    WanVaeType,
    Wav2VecType,
    foreign,
    node_schema,
    reject_foreign,
)
from .types import Adapter, VramManagement

# The public values first and in their order, then ours.
ATTENTION_MODES = [
    "sdpa",
    "flash_attn_2",
    "flash_attn_3",
    "sageattn",
    "sageattn_3",
    "radial_sage_attention",
    "sageattn_compiled",
    "sageattn_ultravico",
    "comfy",
    "auto",
    "sageattn_3_fp4",
    "sageattn_3_fp8",
    "eager",
]
HUB_WAV2VEC = ["TencentGameMate/chinese-wav2vec2-base", "facebook/wav2vec2-base-960h"]
_LOAD_DEVICE_TIP = "main_device: keep it on the GPU. offload_device: keep it in host memory until it is needed."


def load_device_input(default: str, **options: Any) -> Any:
    return io.Combo.Input(
        "load_device", options=["main_device", "offload_device"], default=default, tooltip=_LOAD_DEVICE_TIP, **options
    )


class InfiniteTalkModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkModelLoader",
            "InfiniteTalk Model Loader",
            "Load a Wan2.1 video model: safetensors, scaled fp8 or GGUF, with the InfiniteTalk or MultiTalk adapter "
            "and LoRAs. A model that is already loaded with the same settings is used again.",
            group="loaders",
            aliases=["wan model", "diffusion model", "infinitetalk", "gguf", "fp8", "nvfp4", "加载模型"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=comfyui.model_files("dit"),
                    tooltip="A Wan2.1 file of ComfyUI/models/diffusion_models. Its size is read from the file.",
                ),
                io.Combo.Input(
                    "base_precision",
                    options=list(PRECISIONS),
                    default="bf16",
                    tooltip="What is computed in where nothing is quantized. fp16_fast also lets the GPU accumulate in "
                    "fp16: faster on consumer GPUs, less exact.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(QUANTIZATIONS),
                    default="disabled",
                    tooltip="How the weights of the transformer blocks are kept. Files that are quantized already keep "
                    "their own format. fp8: half the memory. scaled: with a scale per layer. fast: also multiply in "
                    "fp8. fp4_scaled: NVFP4, a quarter of the memory.",
                ),
                load_device_input("offload_device"),
                io.Combo.Input(
                    "attention_mode",
                    options=ATTENTION_MODES,
                    default="sdpa",
                    optional=True,
                    tooltip="How self-attention is computed. auto chooses the fastest that is known to be right on "
                    "this GPU. sageattn_3_fp4 and sageattn_3_fp8 run anywhere; where a package is missing it says so.",
                ),
                CompileType.Input("compile_args", optional=True, tooltip="From InfiniteTalk Torch Compile."),
                BlockSwapType.Input("block_swap_args", optional=True, tooltip="From InfiniteTalk Block Swap."),
                LoraType.Input("lora", optional=True, tooltip="From InfiniteTalk LoRA."),
                VramManagementType.Input(
                    "vram_management_args",
                    optional=True,
                    tooltip="From WanVideo VRAM Management; done by block swap, so give one of the two.",
                ),
                foreign("VACEPATH", "extra_model", "VACE is not supported; leave unconnected."),
                foreign("FANTASYTALKINGMODEL", "fantasytalking_model", "Not supported; leave unconnected."),
                AdapterType.Input(
                    "multitalk_model",
                    optional=True,
                    tooltip="From InfiniteTalk Adapter Loader. Not needed where the model file has audio layers.",
                ),
                foreign("FANTASYPORTRAITMODEL", "fantasyportrait_model", "Not supported; leave unconnected."),
                io.Combo.Input(
                    "rms_norm_function",
                    options=["default", "pytorch"],
                    default="default",
                    optional=True,
                    tooltip="Kept for saved workflows: both compute the same normalization in float32.",
                ),
            ],
            outputs=[WanModelType.Output(display_name="model", tooltip="The loaded model.")],
        )

    @classmethod
    def check_early(cls, model: str | None = None, attention_mode: str | None = "sdpa") -> None:
        if attention_mode is not None:
            canonical_mode(attention_mode)
        if model is not None:
            path = comfyui.model_path("dit", model)
            if path.suffix.lower() in HEADERS:
                DitFiles(path).close()  # which reads names and shapes, and says what is no such model

    @classmethod
    def execute(
        cls,
        model: str,
        base_precision: str,
        quantization: str,
        load_device: str,
        attention_mode: str = "sdpa",
        compile_args: CompileSettings | None = None,
        block_swap_args: BlockSwap | None = None,
        lora: tuple[LoraSpec, ...] | None = None,
        vram_management_args: VramManagement | None = None,
        multitalk_model: Adapter | None = None,
        rms_norm_function: str = "default",
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        if block_swap_args is not None and vram_management_args is not None:
            raise InputError("Block swap is asked for twice: disconnect block_swap_args or vram_management_args.")
        loaded = VideoModel.load(
            comfyui.model_path("dit", model),
            adapter=multitalk_model,
            precision=base_precision,
            quantization=quantization,
            attention_mode=attention_mode,
            loras=lora or (),
            compile_settings=compile_args,
            swap=block_swap_args or vram_management_args,
            keep_on_device=load_device == "main_device",
        )
        return io.NodeOutput(loaded)


class InfiniteTalkAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkAdapterLoader",
            "InfiniteTalk Adapter Loader",
            "Choose the InfiniteTalk or MultiTalk adapter that gives a Wan2.1 I2V model its audio layers.",
            group="loaders",
            aliases=["infinitetalk", "multitalk", "lip sync", "audio adapter", "数字人", "对口型"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=comfyui.model_files("adapter"),
                    tooltip="An adapter file of ComfyUI/models/diffusion_models or models/model_patches, safetensors "
                    "or GGUF. With 'infinite' in its name it counts as InfiniteTalk, else as MultiTalk; the video node "
                    "can overrule that.",
                )
            ],
            outputs=[AdapterType.Output(display_name="model", tooltip="For InfiniteTalk Model Loader.")],
        )

    @classmethod
    def check_early(cls, model: str | None = None) -> None:
        check_file("adapter", model, "adapter")

    @classmethod
    def execute(cls, model: str) -> Any:
        return io.NodeOutput(Adapter(comfyui.model_path("adapter", model)))


class InfiniteTalkVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkVAELoader",
            "InfiniteTalk VAE Loader",
            "Load the Wan2.1 VAE, which turns images into latents and latents into images.",
            group="loaders",
            aliases=["wan vae", "加载 VAE"],
            inputs=[
                io.Combo.Input(
                    "model_name", options=comfyui.model_files("vae"), tooltip="The Wan2.1 VAE in ComfyUI/models/vae."
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "fp32", "bf16"],
                    default="bf16",
                    optional=True,
                    tooltip="What the VAE computes in; fp32 is the most exact and takes twice the memory.",
                ),
                CompileType.Input(
                    "compile_args", optional=True, tooltip="Compile the VAE's decoder with torch.compile."
                ),
                io.Boolean.Input(
                    "use_cpu_cache",
                    default=False,
                    optional=True,
                    tooltip="Kept for saved workflows: the VAE works frame by frame and keeps little on the GPU.",
                ),
                io.Boolean.Input(
                    "verbose", default=False, optional=True, tooltip="Log size and time of every encode and decode."
                ),
            ],
            outputs=[WanVaeType.Output(display_name="vae", tooltip="The loaded VAE.")],
        )

    @classmethod
    def check_early(cls, model_name: str | None = None) -> None:
        check_file("vae", model_name, "VAE")

    @classmethod
    def execute(
        cls,
        model_name: str,
        precision: str = "bf16",
        compile_args: CompileSettings | None = None,
        use_cpu_cache: bool = False,
        verbose: bool = False,
    ) -> Any:
        path = comfyui.model_path("vae", model_name)
        return io.NodeOutput(VaeModel.load(path, precision, compile_settings=compile_args, verbose=verbose))


class InfiniteTalkSmallDecoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSmallDecoderLoader",
            "InfiniteTalk Small Decoder Loader",
            "Load a small decoder of Wan2.1 latents, taew2_1 or lighttaew2_1, for previews: InfiniteTalk Decode takes "
            "it alone, InfiniteTalk Small Decoder joins it with the VAE for long videos. It encodes nothing.",
            group="loaders",
            aliases=["taehv", "taew2_1", "lighttaew2_1", "tiny vae", "加载小型 VAE"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=comfyui.model_files("small_decoder"),
                    tooltip="A file of ComfyUI/models/vae_approx. With 'light' in its name it is given denormalized "
                    "latents, else the model's own: keep the public name.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "fp32", "bf16"],
                    default="fp16",
                    optional=True,
                    tooltip="What the decoder computes in.",
                ),
                io.Boolean.Input(
                    "parallel",
                    default=False,
                    optional=True,
                    tooltip="Decode all frames together, with memory that grows with the length. Off: one latent frame "
                    "after the other, to the same frames.",
                ),
            ],
            outputs=[
                WanVaeType.Output(
                    display_name="vae", tooltip="For InfiniteTalk Decode, or decoder of InfiniteTalk Small Decoder."
                )
            ],
        )

    @classmethod
    def check_early(cls, model_name: str | None = None) -> None:
        check_file("small_decoder", model_name, "decoder")

    @classmethod
    def execute(cls, model_name: str, precision: str = "fp16", parallel: bool = False) -> Any:
        path = comfyui.model_path("small_decoder", model_name)
        return io.NodeOutput(VaeModel.load_small_decoder(path, precision, at_once=parallel))


class InfiniteTalkSmallDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSmallDecoder",
            "InfiniteTalk Small Decoder",
            "Encode by the VAE and decode by a small decoder: previews of long videos. The last decoded frames of a "
            "window are encoded for the next one, so that later windows change too.",
            group="loaders",
            aliases=["tiny vae", "taehv", "preview decoder", "小型解码器"],
            inputs=[
                WanVaeType.Input("vae", tooltip="From InfiniteTalk VAE Loader: encodes."),
                WanVaeType.Input("decoder", tooltip="From InfiniteTalk Small Decoder Loader: decodes."),
            ],
            outputs=[WanVaeType.Output(display_name="vae", tooltip="For InfiniteTalk Long Video, for example.")],
        )

    @classmethod
    def execute(cls, vae: VaeModel, decoder: VaeModel) -> Any:
        return io.NodeOutput(vae.decoding_by(decoder))


class InfiniteTalkTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkTextEncoderLoader",
            "InfiniteTalk Text Encoder Loader",
            "Load the UMT5-XXL text encoder that Wan2.1 understands prompts with.",
            group="loaders",
            aliases=["umt5", "t5", "text encoder", "文本编码器"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=comfyui.model_files("text_encoder"),
                    tooltip="A UMT5-XXL file of ComfyUI/models/text_encoders, with official or Hugging Face key names.",
                ),
                io.Combo.Input(
                    "precision", options=["fp32", "bf16"], default="bf16", tooltip="What the encoder computes in."
                ),
                load_device_input("offload_device", optional=True),
                io.Combo.Input(
                    "quantization",
                    options=list(TEXT_QUANTIZATIONS),
                    default="disabled",
                    optional=True,
                    tooltip="Keep most of the weights in fp8: 7.2 GiB in place of 10.6 for UMT5-XXL.",
                ),
            ],
            outputs=[TextEncoderType.Output(display_name="wan_t5_model", tooltip="The loaded text encoder.")],
        )

    @classmethod
    def check_early(cls, model_name: str | None = None) -> None:
        check_file("text_encoder", model_name, "text encoder")

    @classmethod
    def execute(
        cls, model_name: str, precision: str, load_device: str = "offload_device", quantization: str = "disabled"
    ) -> Any:
        path = comfyui.model_path("text_encoder", model_name)
        return io.NodeOutput(TextModel.load(path, precision, quantization, keep_on_device=load_device == "main_device"))


class InfiniteTalkClipVisionLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkClipVisionLoader",
            "InfiniteTalk CLIP Vision Loader",
            "Load the CLIP vision model of Wan2.1 I2V. Does what ComfyUI's Load CLIP Vision does for the same file, "
            "and also reads the official key names (.pth) and other sizes.",
            group="loaders",
            aliases=["clip vision", "clip_vision_h", "open-clip", "CLIP 视觉"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=comfyui.model_files("clip_vision"),
                    tooltip="CLIP ViT-H of ComfyUI/models/clip_vision.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "fp32", "bf16"],
                    default="fp16",
                    optional=True,
                    tooltip="What the model computes in.",
                ),
            ],
            outputs=[io.ClipVision.Output(display_name="clip_vision", tooltip="For InfiniteTalk CLIP Vision Encode.")],
        )

    @classmethod
    def check_early(cls, clip_name: str | None = None) -> None:
        check_file("clip_vision", clip_name, "CLIP vision model")

    @classmethod
    def execute(cls, clip_name: str, precision: str = "fp16") -> Any:
        return io.NodeOutput(VisionModel.load(comfyui.model_path("clip_vision", clip_name), precision))


def _wav2vec_outputs() -> list[Any]:
    return [Wav2VecType.Output(display_name="wav2vec_model", tooltip="For InfiniteTalk Speech.")]


def _wav2vec_precision() -> Any:
    return io.Combo.Input(
        "base_precision", options=["fp32", "bf16", "fp16"], default="fp16", tooltip="What the model computes in."
    )


class InfiniteTalkWav2VecLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkWav2VecLoader",
            "InfiniteTalk Wav2Vec2 Loader",
            "Load the wav2vec2 model that turns speech into what the lips follow.",
            group="loaders",
            aliases=["wav2vec2", "audio encoder", "speech encoder", "语音编码器"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=comfyui.model_files("wav2vec"),
                    tooltip="chinese-wav2vec2-base in ComfyUI/models/wav2vec2 or models/audio_encoders: one "
                    "safetensors file, or the weights inside a Hugging Face folder.",
                ),
                _wav2vec_precision(),
                load_device_input("main_device"),
            ],
            outputs=_wav2vec_outputs(),
        )

    @classmethod
    def check_early(cls, model: str | None = None) -> None:
        check_file("wav2vec", model, "wav2vec2 model")

    @classmethod
    def execute(cls, model: str, base_precision: str, load_device: str) -> Any:
        return io.NodeOutput(_speech_model(comfyui.model_path("wav2vec", model), base_precision, load_device))


class InfiniteTalkWav2VecDownloader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkWav2VecDownloader",
            "InfiniteTalk Wav2Vec2 Downloader",
            "Load wav2vec2 from ComfyUI/models/wav2vec2; download it from Hugging Face first if it is not there.",
            group="loaders",
            aliases=["wav2vec2", "download wav2vec", "下载"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=HUB_WAV2VEC,
                    tooltip="InfiniteTalk and MultiTalk were trained with chinese-wav2vec2-base.",
                ),
                _wav2vec_precision(),
                load_device_input("main_device"),
            ],
            outputs=_wav2vec_outputs(),
        )

    @classmethod
    def execute(cls, model: str, base_precision: str, load_device: str) -> Any:
        return io.NodeOutput(_speech_model(comfyui.hub_folder(model), base_precision, load_device))


def _speech_model(path: Path, precision: str, load_device: str) -> SpeechModel:
    return SpeechModel.load(path, precision, keep_on_device=load_device == "main_device")
