"""The entry for ComfyUI: the list of our nodes. One file per concern lies in `comfy_nodes`."""

from __future__ import annotations

from typing import Any

from .comfy_nodes import audio, comfyui, images, kernels, latents, loaders, options, sampler, text
from .comfy_nodes.schema import check_numbers_of
from .comfy_nodes.sockets import check_objects_of

comfyui.register_folders()

NODES: list[Any] = [
    loaders.WanVideoModelLoader,
    loaders.MultiTalkModelLoader,
    loaders.WanVideoVAELoader,
    loaders.WanVideoTinyVAELoader,
    loaders.InfiniteTalkSmallDecoder,
    loaders.LoadWanVideoT5TextEncoder,
    loaders.InfiniteTalkClipVisionLoader,
    loaders.Wav2VecModelLoader,
    loaders.DownloadAndLoadWav2VecModel,
    options.WanVideoLoraSelect,
    options.WanVideoLoraSelectMulti,
    options.WanVideoSetLoRAs,
    options.WanVideoBlockSwap,
    options.WanVideoSetBlockSwap,
    options.WanVideoTorchCompileSettings,
    options.CreateCFGScheduleFloatList,
    options.InfiniteTalkPreset,
    kernels.InfiniteTalkAttentionPolicy,
    kernels.WanVideoAttentionDoctor,
    text.WanVideoTextEncode,
    text.WanVideoTextEncodeCached,
    text.WanVideoTextEmbedBridge,
    audio.MultiTalkWav2VecEmbeds,
    audio.MultiTalkSilentEmbeds,
    audio.NormalizeAudioLoudness,
    images.WanVideoClipVisionEncode,
    images.WanVideoImageToVideoMultiTalk,
    images.WanVideoImageToVideoEncode,
    images.WanVideoEmptyEmbeds,
    latents.WanVideoEncode,
    latents.WanVideoDecode,
    latents.WanVideoPassImagesFromSamples,
    sampler.WanVideoSampler,
]

for _node in NODES:
    check_numbers_of(_node)
    check_objects_of(_node)


class InfiniteTalkExtension(comfyui.ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return NODES


async def comfy_entrypoint() -> InfiniteTalkExtension:
    return InfiniteTalkExtension()
