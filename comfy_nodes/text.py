"""Prompts: encoded with our text encoder, or handed over from ComfyUI's."""

from __future__ import annotations

from typing import Any

from ..wanvideo.encoders.text import TEXT_QUANTIZATIONS
from ..wanvideo.errors import InputError
from . import comfyui
from .comfyui import io
from .models import TextModel, check_file
from .schema import UNCONNECTED, TextEmbedsType, TextEncoderType, WanModelType, foreign, node_schema, reject_foreign
from .types import TextEmbeds

_POSITIVE_TIP = (
    "What the video shows. Texts between vertical bars are for one window of a long video each; the last one stays. "
    "(text:1.2) multiplies the embedding of the whole text that it stands in, not of single words. "
    "[1] and [2] are plain text."
)
_NEGATIVE_TIP = "What the video should not show, encoded as it stands; used where cfg is above 1."
_DISK_CACHE_TIP = "Keep the result in ComfyUI's user folder, so that this prompt never needs the encoder again."
_DEVICE_TIP = "Where the text encoder runs."


def _prompt(input_id: str, tooltip: str) -> Any:
    return io.String.Input(input_id, default="", multiline=True, tooltip=tooltip)


def _check_encoder(use_disk_cache: bool | None, t5: Any) -> None:
    if t5 is UNCONNECTED and use_disk_cache is False:
        raise InputError(
            "There is no text encoder: connect t5 (InfiniteTalk Text Encoder Loader), or turn use_disk_cache on for "
            "prompts that were encoded before."
        )


def _encoding_options() -> list[Any]:
    """How the nodes that are given a text encoder use it."""
    return [
        TextEncoderType.Input(
            "t5",
            optional=True,
            tooltip="From InfiniteTalk Text Encoder Loader. May be left out for prompts in the disk cache.",
        ),
        io.Boolean.Input(
            "force_offload",
            default=True,
            optional=True,
            tooltip="Move the text encoder to host memory when it is done.",
        ),
        WanModelType.Input(
            "model_to_offload",
            optional=True,
            tooltip="A video model to move to host memory first, so that the text encoder has room.",
        ),
        io.Boolean.Input("use_disk_cache", default=False, optional=True, tooltip=_DISK_CACHE_TIP),
        io.Combo.Input("device", options=["gpu", "cpu"], default="gpu", optional=True, tooltip=_DEVICE_TIP),
    ]


class InfiniteTalkTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkTextEncode",
            "InfiniteTalk Text Encode",
            "Encode the prompt and the negative prompt.",
            group="text",
            aliases=["prompt", "text encode", "提示词"],
            inputs=[
                _prompt("positive_prompt", _POSITIVE_TIP),
                _prompt("negative_prompt", _NEGATIVE_TIP),
                *_encoding_options(),
            ],
            outputs=[TextEmbedsType.Output(display_name="text_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def check_early(cls, use_disk_cache: bool | None = False, t5: Any = UNCONNECTED) -> None:
        _check_encoder(use_disk_cache, t5)

    @classmethod
    def execute(
        cls,
        positive_prompt: str,
        negative_prompt: str,
        t5: TextModel | None = None,
        force_offload: bool = True,
        model_to_offload: Any = None,
        use_disk_cache: bool = False,
        device: str = "gpu",
    ) -> Any:
        if model_to_offload is not None:
            model_to_offload.unload()
        cache = comfyui.cache_folder("prompts") if use_disk_cache else None
        embeds = TextModel.encode_prompts(t5, positive_prompt, negative_prompt, device=device, cache=cache)
        if t5 is not None and force_offload:
            t5.unload()
        return io.NodeOutput(embeds)


class InfiniteTalkTextEncodeSingle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkTextEncodeSingle",
            "InfiniteTalk Text Encode Single",
            "Encode one text as it stands, without a negative prompt: for cfg 1, or for InfiniteTalk NAG.",
            group="text",
            aliases=["prompt", "single prompt", "单个提示词"],
            inputs=[
                _prompt("prompt", "The text. Bars and brackets in it are plain text."),
                *_encoding_options(),
            ],
            outputs=[TextEmbedsType.Output(display_name="text_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def check_early(cls, use_disk_cache: bool | None = False, t5: Any = UNCONNECTED) -> None:
        _check_encoder(use_disk_cache, t5)

    @classmethod
    def execute(
        cls,
        prompt: str,
        t5: TextModel | None = None,
        force_offload: bool = True,
        model_to_offload: Any = None,
        use_disk_cache: bool = False,
        device: str = "gpu",
    ) -> Any:
        if model_to_offload is not None:
            model_to_offload.unload()
        cache = comfyui.cache_folder("prompts") if use_disk_cache else None
        features = TextModel.encode_text(t5, prompt, device=device, cache=cache)
        if t5 is not None and force_offload:
            t5.unload()
        return io.NodeOutput(TextEmbeds((features,)))


class InfiniteTalkTextEncodeCached(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkTextEncodeCached",
            "InfiniteTalk Text Encode Cached",
            "Encode prompts with a text encoder that is loaded for the moment only, and not at all for known prompts.",
            group="text",
            aliases=["prompt", "cached prompt", "提示词 缓存"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=comfyui.model_files("text_encoder"),
                    tooltip="A UMT5-XXL file of ComfyUI/models/text_encoders.",
                ),
                io.Combo.Input(
                    "precision", options=["fp32", "bf16"], default="bf16", tooltip="What the encoder computes in."
                ),
                _prompt("positive_prompt", _POSITIVE_TIP),
                _prompt("negative_prompt", _NEGATIVE_TIP),
                io.Combo.Input(
                    "quantization",
                    options=list(TEXT_QUANTIZATIONS),
                    default="disabled",
                    tooltip="Keep most of the weights in fp8 while encoding: 7.2 GiB in place of 10.6 for UMT5-XXL.",
                ),
                io.Boolean.Input("use_disk_cache", default=True, tooltip=_DISK_CACHE_TIP),
                io.Combo.Input("device", options=["gpu", "cpu"], default="gpu", tooltip=_DEVICE_TIP),
                foreign("WANVIDEOPROMPTEXTENDER_ARGS", "extender_args", "Not supported; leave unconnected."),
            ],
            outputs=[
                TextEmbedsType.Output(display_name="text_embeds", tooltip="For InfiniteTalk Sampler."),
                TextEmbedsType.Output(
                    display_name="negative_text_embeds", tooltip="The negative prompt as if it were a prompt."
                ),
                io.String.Output(display_name="positive_prompt", tooltip="The prompt as it was encoded."),
            ],
        )

    @classmethod
    def check_early(cls, model_name: str | None = None) -> None:
        check_file("text_encoder", model_name, "text encoder")

    @classmethod
    def execute(
        cls,
        model_name: str,
        precision: str,
        positive_prompt: str,
        negative_prompt: str,
        quantization: str,
        use_disk_cache: bool,
        device: str,
        **foreign_sockets: Any,
    ) -> Any:
        reject_foreign(cls, foreign_sockets)
        embeds = TextModel.encode_once(
            comfyui.model_path("text_encoder", model_name),
            precision,
            quantization,
            positive_prompt,
            negative_prompt,
            device=device,
            cache=comfyui.cache_folder("prompts") if use_disk_cache else None,
        )
        assert embeds.negative is not None
        negative = TextEmbeds((embeds.negative,), embeds.negative)
        return io.NodeOutput(embeds, negative, positive_prompt)


class InfiniteTalkTextEmbedBridge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkTextEmbedBridge",
            "InfiniteTalk Text Embed Bridge",
            "Use prompts encoded by ComfyUI's own CLIP Text Encode (Load CLIP with type wan).",
            group="text",
            aliases=["conditioning", "clip text encode", "提示词 桥接"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt, encoded by ComfyUI with type wan."),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt, encoded alike."),
            ],
            outputs=[TextEmbedsType.Output(display_name="text_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any = None) -> Any:
        return io.NodeOutput(TextEmbeds((_only(positive),), None if not negative else _only(negative)))


def _only(conditioning: Any) -> Any:
    """The embedding of a CONDITIONING: a list of [embeddings [1, tokens, width], options], here of one."""
    if len(conditioning) != 1 or len(conditioning[0][0]) != 1:
        raise InputError("Combined or batched conditionings are not supported: connect one CLIP Text Encode.")
    return conditioning[0][0][0]
