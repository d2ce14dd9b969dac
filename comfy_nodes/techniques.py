"""Changes of the steps that need no training: Enhance-A-Video, skip-layer and attention guidance, step caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..pipeline.blocks import parse_blocks
from ..pipeline.step_cache import EasyCache, MagCache, TeaCache
from ..pipeline.techniques import EnhanceVideo, SkipLayers
from ..wanvideo.errors import InputError
from ..wanvideo.modules.techniques import NormalizedAttention
from .comfyui import io
from .schema import EnhanceVideoType, SkipLayersType, StepCacheType, TextEmbedsType, node_schema
from .types import TextEmbeds


def _part(input_id: str, default: float, tooltip: str) -> Any:
    return io.Float.Input(input_id, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _parts(start: float) -> list[Any]:
    return [
        _part("start_percent", start, "Where it begins, as a part of the steps."),
        _part("end_percent", 1.0, "Where it ends, as a part of the steps."),
    ]


class InfiniteTalkEnhanceVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkEnhanceVideo",
            "InfiniteTalk Enhance-A-Video",
            "Strengthen the attention of frames to each other: steadier motion, more detail. For the sampler.",
            group="options",
            aliases=["enhance a video", "feta", "视频增强"],
            inputs=[
                io.Float.Input(
                    "weight",
                    default=2.0,
                    min=0,
                    max=100,
                    step=0.01,
                    tooltip="How much it is strengthened; the frames of a window count too, so that small numbers do.",
                ),
                *_parts(0.0),
            ],
            outputs=[EnhanceVideoType.Output(display_name="feta_args", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(cls, weight: float, start_percent: float, end_percent: float) -> Any:
        return io.NodeOutput(EnhanceVideo(weight, start_percent, end_percent))


class InfiniteTalkSkipLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkSkipLayers",
            "InfiniteTalk Skip Layers",
            "Leave blocks out in the passes with the negative prompt, so that guidance leads away from what a weaker "
            "model makes. Needs cfg above 1.",
            group="options",
            aliases=["slg", "skip layer guidance", "跳层引导"],
            inputs=[
                io.String.Input(
                    "blocks",
                    default="10",
                    tooltip="Indices of the blocks from 0, separated by commas; 9-11 is a range. 14B models have 40.",
                ),
                *_parts(0.1),
            ],
            outputs=[SkipLayersType.Output(display_name="slg_args", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(cls, blocks: str, start_percent: float, end_percent: float) -> Any:
        return io.NodeOutput(SkipLayers(parse_blocks(blocks), start_percent, end_percent))


class InfiniteTalkNag(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return node_schema(
            "InfiniteTalkNag",
            "InfiniteTalk NAG",
            "A negative prompt inside the text attention, which works with cfg 1 too and costs no second pass "
            "(normalized attention guidance).",
            group="text",
            aliases=["nag", "normalized attention guidance", "negative prompt", "负面提示词"],
            inputs=[
                TextEmbedsType.Input("original_text_embeds", tooltip="The prompt, from InfiniteTalk Text Encode."),
                TextEmbedsType.Input(
                    "nag_text_embeds", tooltip="What to move away from, as the prompt of a text encode node of its own."
                ),
                io.Float.Input(
                    "nag_scale", default=11.0, min=0.0, max=100.0, step=0.1, tooltip="How far to move away; 1 is not."
                ),
                io.Float.Input(
                    "nag_tau",
                    default=2.5,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Limit of what moving away adds, as a ratio of sizes.",
                ),
                io.Float.Input(
                    "nag_alpha",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the changed attention in the result; 0 changes nothing.",
                ),
                io.Boolean.Input(
                    "inplace", default=True, optional=True, tooltip="Kept for saved workflows; both give the same."
                ),
            ],
            outputs=[TextEmbedsType.Output(display_name="text_embeds", tooltip="For InfiniteTalk Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        original_text_embeds: TextEmbeds,
        nag_text_embeds: TextEmbeds,
        nag_scale: float,
        nag_tau: float,
        nag_alpha: float,
        inplace: bool = True,
    ) -> Any:
        if len(nag_text_embeds.positive) > 1:
            raise InputError(
                f"The prompt of nag_text_embeds has {len(nag_text_embeds.positive)} pieces, and all windows share one: "
                "remove the | from it."
            )
        nag = NormalizedAttention(nag_text_embeds.positive[0], nag_scale, nag_tau, nag_alpha)
        return io.NodeOutput(replace(original_text_embeds, nag=nag))


# --- step caches -------------------------------------------------------------------------------------------------

_SAVING = (
    "Larger leaves out more steps and changes the video more. The log says how many were left out; few-step runs have "
    "none to spare."
)


def _threshold(input_id: str, default: float, most: float, tooltip: str = _SAVING) -> Any:
    return io.Float.Input(input_id, default=default, min=0.0, max=most, step=0.001, tooltip=tooltip)


def _cache_widgets(start: int) -> list[Any]:
    """Which steps may be left out, and where what is reused lies."""
    return [
        io.Int.Input("start_step", default=start, min=0, max=9999, step=1, tooltip="First step that may be left out."),
        io.Int.Input(
            "end_step", default=-1, min=-1, max=9999, step=1, tooltip="Last step that may be left out; -1 is the last."
        ),
        io.Combo.Input(
            "cache_device",
            options=["main_device", "offload_device"],
            default="offload_device",
            tooltip="Where what is reused is kept: on the GPU, or in host memory.",
        ),
    ]


def _cache_schema(node_id: str, display_name: str, description: str, aliases: list[str], inputs: list[Any]) -> Any:
    return node_schema(
        node_id,
        display_name,
        description,
        group="options",
        aliases=[*aliases, "step cache", "步缓存"],
        inputs=inputs,
        outputs=[StepCacheType.Output(display_name="cache_args", tooltip="For InfiniteTalk Sampler.")],
    )


class InfiniteTalkEasyCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _cache_schema(
            "InfiniteTalkEasyCache",
            "InfiniteTalk EasyCache",
            "Leave out steps whose result the last ones foretell. Needs nothing measured of the model. Faster, less "
            "exact.",
            ["easycache"],
            [_threshold("easycache_thresh", 0.015, 1.0), *_cache_widgets(10)],
        )

    @classmethod
    def execute(cls, easycache_thresh: float, start_step: int, end_step: int, cache_device: str) -> Any:
        return io.NodeOutput(EasyCache(easycache_thresh, start_step, end_step, cache_device != "main_device"))


class InfiniteTalkTeaCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _cache_schema(
            "InfiniteTalkTeaCache",
            "InfiniteTalk TeaCache",
            "Leave out steps whose time differs little from the last computed one, by a polynomial that was fitted to "
            "Wan2.1. Faster, less exact.",
            ["teacache"],
            [
                _threshold("rel_l1_thresh", 0.3, 1.0),
                *_cache_widgets(1),
                io.Boolean.Input(
                    "use_coefficients",
                    default=True,
                    tooltip="Use the polynomial of the model. Off: the distance itself, with a threshold ten times "
                    "smaller.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["e", "e0"],
                    default="e",
                    optional=True,
                    tooltip="What is compared: the embedding of the time (e), or its projection for the blocks (e0).",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        rel_l1_thresh: float,
        start_step: int,
        end_step: int,
        cache_device: str,
        use_coefficients: bool,
        mode: str = "e",
    ) -> Any:
        coefficients = () if use_coefficients else None  # those of the model, once it is known
        on_host = cache_device != "main_device"
        return io.NodeOutput(TeaCache(rel_l1_thresh, start_step, end_step, on_host, coefficients, mode == "e0"))


class InfiniteTalkMagCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return _cache_schema(
            "InfiniteTalkMagCache",
            "InfiniteTalk MagCache",
            "Leave out steps by how much the size of what the blocks add changes, as it was measured of Wan2.1 14B. "
            "Faster, less exact.",
            ["magcache"],
            [
                _threshold("magcache_thresh", 0.02, 0.3),
                io.Int.Input(
                    "magcache_K",
                    default=4,
                    min=0,
                    max=6,
                    step=1,
                    tooltip="How many steps may be left out one after the other.",
                ),
                *_cache_widgets(1),
            ],
        )

    @classmethod
    def execute(cls, magcache_thresh: float, magcache_K: int, start_step: int, end_step: int, cache_device: str) -> Any:
        return io.NodeOutput(MagCache(magcache_thresh, start_step, end_step, cache_device != "main_device", magcache_K))
