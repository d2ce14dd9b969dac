"""The entry for ComfyUI: the list of our nodes. One file per concern lies in `comfy_nodes`."""

from __future__ import annotations

from typing import Any

from .comfy_nodes import (
    audio,
    comfyui,
    humo,
    images,
    kernels,
    latents,
    loaders,
    masks,
    measure,
    neighbors,
    options,
    sampler,
    saved,
    techniques,
    text,
)
from .comfy_nodes.schema import answer_early, check_numbers_of
from .comfy_nodes.sockets import check_objects_of

comfyui.register_folders()

NODES: list[Any] = [
    loaders.InfiniteTalkModelLoader,
    loaders.InfiniteTalkAdapterLoader,
    loaders.InfiniteTalkVAELoader,
    loaders.InfiniteTalkSmallDecoderLoader,
    loaders.InfiniteTalkSmallDecoder,
    loaders.InfiniteTalkTextEncoderLoader,
    loaders.InfiniteTalkClipVisionLoader,
    loaders.InfiniteTalkWav2VecLoader,
    loaders.InfiniteTalkWav2VecDownloader,
    humo.InfiniteTalkWhisperLoader,
    options.InfiniteTalkLora,
    options.InfiniteTalkLoras,
    options.InfiniteTalkSetLoras,
    options.InfiniteTalkBlockSwap,
    options.InfiniteTalkSetBlockSwap,
    options.InfiniteTalkTorchCompile,
    options.InfiniteTalkCfgSchedule,
    options.InfiniteTalkPreset,
    techniques.InfiniteTalkEnhanceVideo,
    techniques.InfiniteTalkSkipLayers,
    techniques.InfiniteTalkNag,
    techniques.InfiniteTalkEasyCache,
    techniques.InfiniteTalkTeaCache,
    techniques.InfiniteTalkMagCache,
    kernels.InfiniteTalkAttention,
    kernels.InfiniteTalkAttentionPolicy,
    kernels.InfiniteTalkAttentionDoctor,
    text.InfiniteTalkTextEncode,
    text.InfiniteTalkTextEncodeSingle,
    text.InfiniteTalkTextEncodeCached,
    text.InfiniteTalkTextEmbedBridge,
    masks.InfiniteTalkSpeakerMasks,
    audio.InfiniteTalkSpeech,
    audio.InfiniteTalkSilence,
    audio.InfiniteTalkNormalizeLoudness,
    measure.InfiniteTalkMeasure,
    images.InfiniteTalkClipVisionEncode,
    images.InfiniteTalkLongVideo,
    images.InfiniteTalkImageToVideo,
    images.InfiniteTalkEmptyVideo,
    humo.InfiniteTalkHuMo,
    latents.InfiniteTalkEncode,
    latents.InfiniteTalkDecode,
    latents.InfiniteTalkImagesFromSamples,
    sampler.InfiniteTalkSampler,
]

for _node in NODES + saved.SAVED_NODES:
    check_numbers_of(_node)
    check_objects_of(_node)
    answer_early(_node)


class InfiniteTalkExtension(comfyui.ComfyExtension):
    async def on_load(self) -> None:
        for node in NODES:
            schema = node.define_schema()
            if schema.node_id in neighbors.PUBLIC_IDS:
                await comfyui.register_replacement(neighbors.PUBLIC_IDS[schema.node_id][0], schema)

    async def get_node_list(self) -> list[Any]:
        return NODES + neighbors.aliases(NODES, saved.SAVED_NODES)


async def comfy_entrypoint() -> InfiniteTalkExtension:
    return InfiniteTalkExtension()
