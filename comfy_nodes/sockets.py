"""What each socket type of ours carries, and the sentence for an object of another pack that has the same type name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..pipeline.step_cache import StepCache
from ..pipeline.techniques import EnhanceVideo, SkipLayers
from ..wanvideo.checkpoints.lora import LoraSpec
from ..wanvideo.errors import InputError
from ..wanvideo.runtime.compilation import CompileSettings
from ..wanvideo.runtime.offload import BlockSwap
from . import schema
from .models import SpeechModel, TextModel, VaeModel, VideoModel, WhisperModel
from .types import (
    Adapter,
    ClipEmbeds,
    ExtraArgs,
    HuMoVideo,
    LongVideo,
    OneWindow,
    SamplerArgs,
    SchedulerChoice,
    TextEmbeds,
    VramManagement,
)

__all__ = ["CARRIED", "check_objects_of"]

CARRIED: dict[Any, tuple[type | tuple[type, ...], str]] = {
    schema.WanModelType: (VideoModel, "InfiniteTalk Model Loader"),
    schema.WanVaeType: (VaeModel, "InfiniteTalk VAE Loader"),
    schema.AdapterType: (Adapter, "InfiniteTalk Adapter Loader"),
    schema.Wav2VecType: (SpeechModel, "InfiniteTalk Wav2Vec2 Loader"),
    schema.WhisperType: (WhisperModel, "InfiniteTalk Whisper Loader"),
    schema.TextEncoderType: (TextModel, "InfiniteTalk Text Encoder Loader"),
    schema.TextEmbedsType: (TextEmbeds, "InfiniteTalk Text Encode"),
    schema.ClipEmbedsType: (ClipEmbeds, "InfiniteTalk CLIP Vision Encode"),
    schema.ImageEmbedsType: ((LongVideo, OneWindow, HuMoVideo), "InfiniteTalk Long Video"),
    schema.SpeechEmbedsType: (Mapping, "InfiniteTalk Speech"),
    schema.LoraType: (LoraSpec, "InfiniteTalk LoRA"),
    schema.BlockSwapType: (BlockSwap, "InfiniteTalk Block Swap"),
    schema.CompileType: (CompileSettings, "InfiniteTalk Torch Compile"),
    schema.EnhanceVideoType: (EnhanceVideo, "InfiniteTalk Enhance-A-Video"),
    schema.SkipLayersType: (SkipLayers, "InfiniteTalk Skip Layers"),
    schema.StepCacheType: (StepCache, "InfiniteTalk EasyCache"),
    schema.VramManagementType: (VramManagement, "WanVideo VRAM Management"),
    schema.SchedulerType: (SchedulerChoice, "WanVideo Scheduler v2"),
    schema.ExtraArgsType: (ExtraArgs, "WanVideoSampler v2 Extra Args"),
    schema.SamplerArgsType: (SamplerArgs, "WanVideo Sampler Settings"),
}
"""Socket type -> class of its values (or of their items), and the node of this pack that gives it."""


def check_objects_of(node: Any) -> None:
    """Make `node` reject objects that another pack made, before it runs.

    Other packs use the same type names for objects of their own, and ComfyUI connects what has the same name.
    """
    carried = {kind.io_type: entry for kind, entry in CARRIED.items()}

    @functools.cache
    def expected() -> dict[str, tuple[type | tuple[type, ...], str]]:
        found = {socket.id: socket.get_io_type() for socket in node.define_schema().inputs}
        return {name: carried[kind] for name, kind in found.items() if kind in carried}

    def check(given: dict[str, Any]) -> None:
        for name, (kind, maker) in expected().items():
            value = given.get(name)
            items = value if isinstance(value, (list, tuple)) and kind is LoraSpec else [value]
            for item in items:
                if item is not None and not isinstance(item, kind):
                    raise InputError(
                        f"{name} comes from a node of another pack (a {type(item).__name__}), whose objects this node "
                        f"cannot use: connect {maker} of {schema.CATEGORY}."
                    )

    schema.check_before(node, check)
