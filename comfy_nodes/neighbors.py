"""The ids under which nodes of this pack are registered, beside ComfyUI-WanVideoWrapper and without it.

Ids must be unique in ComfyUI: the pack that is loaded last has them, in silence. So the pack's nodes have ids of their
own. Saved workflows name the wrapper's ids; those are aliases of the same classes, registered where the wrapper is not
installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import wraps
from typing import Any

from . import comfyui
from .schema import CATEGORY

__all__ = ["PUBLIC_IDS", "SETTING", "aliases", "taken"]

logger = logging.getLogger(__name__)

SETTING = "INFINITETALK_WRAPPER_IDS"
"""Environment variable: 1 registers the wrapper's ids in any case, 0 in none."""

WRAPPER = "wanvideowrapper"
"""In the name of its folder, whoever's copy it is."""

PUBLIC_IDS: dict[str, tuple[str, str]] = {
    "InfiniteTalkModelLoader": ("WanVideoModelLoader", "WanVideo Model Loader"),
    "InfiniteTalkAdapterLoader": ("MultiTalkModelLoader", "Multi/InfiniteTalk Model Loader"),
    "InfiniteTalkVAELoader": ("WanVideoVAELoader", "WanVideo VAE Loader"),
    "InfiniteTalkSmallDecoderLoader": ("WanVideoTinyVAELoader", "WanVideo Tiny VAE Loader"),
    "InfiniteTalkTextEncoderLoader": ("LoadWanVideoT5TextEncoder", "WanVideo T5 Text Encoder Loader"),
    "InfiniteTalkWav2VecLoader": ("Wav2VecModelLoader", "Wav2vec2 Model Loader"),
    "InfiniteTalkWav2VecDownloader": ("DownloadAndLoadWav2VecModel", "(Down)load Wav2Vec Model"),
    "InfiniteTalkLora": ("WanVideoLoraSelect", "WanVideo Lora Select"),
    "InfiniteTalkLoras": ("WanVideoLoraSelectMulti", "WanVideo Lora Select Multi"),
    "InfiniteTalkSetLoras": ("WanVideoSetLoRAs", "WanVideo Set LoRAs"),
    "InfiniteTalkBlockSwap": ("WanVideoBlockSwap", "WanVideo Block Swap"),
    "InfiniteTalkSetBlockSwap": ("WanVideoSetBlockSwap", "WanVideo Set BlockSwap"),
    "InfiniteTalkTorchCompile": ("WanVideoTorchCompileSettings", "WanVideo Torch Compile Settings"),
    "InfiniteTalkCfgSchedule": ("CreateCFGScheduleFloatList", "Create CFG Schedule Float List"),
    "InfiniteTalkEnhanceVideo": ("WanVideoEnhanceAVideo", "WanVideo Enhance-A-Video"),
    "InfiniteTalkSkipLayers": ("WanVideoSLG", "WanVideo SLG"),
    "InfiniteTalkEasyCache": ("WanVideoEasyCache", "WanVideo EasyCache"),
    "InfiniteTalkTeaCache": ("WanVideoTeaCache", "WanVideo TeaCache"),
    "InfiniteTalkMagCache": ("WanVideoMagCache", "WanVideo MagCache"),
    "InfiniteTalkNag": ("WanVideoApplyNAG", "WanVideo Apply NAG"),
    "InfiniteTalkTextEncode": ("WanVideoTextEncode", "WanVideo TextEncode"),
    "InfiniteTalkTextEncodeSingle": ("WanVideoTextEncodeSingle", "WanVideo TextEncodeSingle"),
    "InfiniteTalkTextEncodeCached": ("WanVideoTextEncodeCached", "WanVideo TextEncode Cached"),
    "InfiniteTalkTextEmbedBridge": ("WanVideoTextEmbedBridge", "WanVideo TextEmbed Bridge"),
    "InfiniteTalkSpeech": ("MultiTalkWav2VecEmbeds", "Multi/InfiniteTalk Wav2vec2 Embeds"),
    "InfiniteTalkSilence": ("MultiTalkSilentEmbeds", "MultiTalk Silent Embeds"),
    "InfiniteTalkNormalizeLoudness": ("NormalizeAudioLoudness", "Normalize Audio Loudness"),
    "InfiniteTalkClipVisionEncode": ("WanVideoClipVisionEncode", "WanVideo ClipVision Encode"),
    "InfiniteTalkLongVideo": ("WanVideoImageToVideoMultiTalk", "WanVideo Long I2V Multi/InfiniteTalk"),
    "InfiniteTalkImageToVideo": ("WanVideoImageToVideoEncode", "WanVideo ImageToVideo Encode"),
    "InfiniteTalkEmptyVideo": ("WanVideoEmptyEmbeds", "WanVideo Empty Embeds"),
    "InfiniteTalkWhisperLoader": ("WhisperModelLoader", "Whisper Model Loader"),
    "InfiniteTalkHuMo": ("HuMoEmbeds", "HuMo Embeds"),
    "InfiniteTalkEncode": ("WanVideoEncode", "WanVideo Encode"),
    "InfiniteTalkDecode": ("WanVideoDecode", "WanVideo Decode"),
    "InfiniteTalkImagesFromSamples": ("WanVideoPassImagesFromSamples", "WanVideo Pass Images From Samples"),
    "InfiniteTalkSampler": ("WanVideoSampler", "WanVideo Sampler"),
}
"""Id of our node -> its id and display name in ComfyUI-WanVideoWrapper."""


def taken() -> str | None:
    """Why the wrapper's ids are not free, in a clause; None: they are. It may be loaded before this pack or after."""
    for folder in comfyui.custom_node_folders():
        name = "".join(letter for letter in folder.name.lower() if letter.isalnum())
        if WRAPPER in name and not name.endswith("disabled"):
            return f"it is installed in {folder}"
    public_id, _ = PUBLIC_IDS["InfiniteTalkSampler"]
    return f"a pack that was loaded before has the id {public_id}" if comfyui.is_registered(public_id) else None


def aliases(nodes: Iterable[Any], saved: Iterable[Any] = ()) -> list[Any]:
    """The nodes once more under the wrapper's ids, and those that only `saved` workflows need, where the ids are free.

    One line in the log says what was chosen.
    """
    asked = os.environ.get(SETTING, "").strip()
    reason = taken()
    if asked not in ("", "0", "1"):
        logger.warning("%s=%s is not read: set it to 0 or 1.", SETTING, asked)
    if asked == "0" or (asked != "1" and reason is not None):
        logger.info(
            "InfiniteTalk: the node ids of ComfyUI-WanVideoWrapper are left to it (%s); this pack's nodes are in the "
            "category %s. %s=1 gives workflows with the wrapper's ids to this pack.",
            f"{SETTING}=0" if asked == "0" else reason,
            CATEGORY,
            SETTING,
        )
        return []
    logger.info(
        "InfiniteTalk: workflows of ComfyUI-WanVideoWrapper run on the nodes of this pack, which has its node ids too "
        "(%s).",
        f"{SETTING}=1" if asked == "1" else "it is not installed",
    )
    return [*(_alias(node) for node in nodes if node.define_schema().node_id in PUBLIC_IDS), *saved]


def _alias(node: Any) -> Any:
    """The same class under the wrapper's id and name, without the inputs that its `PUBLIC` states."""
    public_id, display_name = PUBLIC_IDS[node.define_schema().node_id]
    fixed = getattr(node, "PUBLIC", {})

    def define_schema(cls: Any) -> Any:
        schema = node.define_schema()
        schema.node_id, schema.display_name = public_id, display_name
        schema.category = f"{CATEGORY}/ids of WanVideoWrapper"
        schema.inputs = [entry for entry in schema.inputs if entry.id not in fixed]
        return schema

    @wraps(node.execute.__func__)
    def execute(cls: Any, **inputs: Any) -> Any:
        return node.execute(**inputs, **fixed)

    members = {"define_schema": classmethod(define_schema), "__module__": node.__module__}
    if fixed:
        members["execute"] = classmethod(execute)
    return type(public_id, (node,), members)
