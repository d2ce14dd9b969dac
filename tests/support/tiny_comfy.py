"""A ComfyUI folder with tiny models under the names that the example workflows ask for, and files to load."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from wanvideo_infinitetalk.cli.tiny_models import TinySet, make_tiny
from wanvideo_infinitetalk.wanvideo.checkpoints.dit import inspect_dit

from support.make_workflows import REAL, TINY
from support.workflows import ROOT

FOLDERS = {
    "dit": "diffusion_models",
    "gguf": "diffusion_models",
    "adapter": "diffusion_models",
    "multi_adapter": "diffusion_models",
    "lora": "loras",
    "vae": "vae",
    "text": "text_encoders",
    "clip": "clip_vision",
    "wav2vec": "wav2vec2",
}


def fill(base: Path) -> None:
    """Write models and inputs below `base`."""
    sources = _sources(make_tiny(base / "tiny"), base / "lora.safetensors")
    for names in (REAL, TINY):
        for kind, name in names.items():
            if kind not in FOLDERS:  # HuMo's, see `fill_humo`
                continue
            folder = base / "models" / FOLDERS[kind]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(sources[kind], folder / name)
    (base / "input").mkdir(exist_ok=True)
    for source, name in (
        ("portrait.png", "portrait.png"),
        ("speech.wav", "speech.wav"),
        ("speech.wav", "speech_2.wav"),
    ):
        shutil.copy(ROOT / "assets" / source, base / "input" / name)
    _two_people(base / "input/two_people.png")
    _source_video(base / "input/source.mp4")


def _sources(tiny: TinySet, lora: Path) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(0)
    dim = inspect_dit(tiny.model).dim
    pairs = {}
    for block in range(2):
        stem = f"diffusion_model.blocks.{block}.self_attn.q"
        pairs[f"{stem}.lora_A.weight"] = torch.randn(4, dim, generator=generator) * 0.1
        pairs[f"{stem}.lora_B.weight"] = torch.randn(dim, 4, generator=generator) * 0.1
    save_file(pairs, lora)
    return {
        "dit": tiny.model,
        "gguf": tiny.model,  # read as what it is, whatever its name
        "adapter": tiny.adapter,
        "multi_adapter": tiny.adapter,
        "lora": lora,
        "vae": tiny.vae,
        "text": tiny.text_encoder,
        "clip": tiny.clip_vision,
        "wav2vec": tiny.wav2vec_file,
    }


def _two_people(path: Path) -> None:
    from PIL import Image, ImageOps

    person = Image.open(ROOT / "assets/portrait.png").convert("RGB").resize((416, 480))
    both = Image.new("RGB", (832, 480))
    both.paste(person, (0, 0))
    both.paste(ImageOps.mirror(person), (416, 0))
    both.save(path)


def _source_video(path: Path, frames: int = 30) -> None:
    """The portrait, moving sideways."""
    import av
    from PIL import Image

    person = np.asarray(Image.open(ROOT / "assets/portrait.png").convert("RGB").resize((96, 64)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(person, i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# Files of a `TinySet` -> the folder of ComfyUI's models.
HUMO_FOLDERS = {
    "humo": "diffusion_models",
    "humo_small": "diffusion_models",
    "model": "diffusion_models",
    "vae": "vae",
    "text_encoder": "text_encoders",
    "whisper": "audio_encoders",
    "wav2vec_file": "audio_encoders",
}


def humo_name(path: Path) -> str:
    """Of a file of the random set, whose names are those of the set that talks."""
    return f"random-{path.name}"


def fill_humo(base: Path, tiny: TinySet) -> None:
    """Write HuMo's models, which are in the random set alone, and its inputs below `base`."""
    for kind, name in HUMO_FOLDERS.items():
        source, folder = getattr(tiny, kind), base / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / humo_name(source))
    (base / "input").mkdir(exist_ok=True)
    shutil.copy(ROOT / "assets/portrait.png", base / "input/portrait.png")
    samples = torch.randn(11_500, generator=torch.Generator().manual_seed(0)) * 0.1  # 17 frames
    soundfile.write(base / "input/humo.wav", samples.numpy(), 16_000)


def humo_template(prompt: dict[str, Any], tiny: TinySet) -> dict[str, Any]:
    """The example workflow of HuMo on the models and the recording of `fill_humo`."""
    parts = {"humo": tiny.humo, "vae": tiny.vae, "text": tiny.text_encoder, "whisper": tiny.whisper}
    names = {REAL[kind]: humo_name(path) for kind, path in parts.items()} | {"speech.wav": "humo.wav"}
    for node in prompt.values():
        node["inputs"] = {
            name: names.get(value, value) if isinstance(value, str) else value for name, value in node["inputs"].items()
        }
    return prompt


def humo_prompt(tiny: TinySet) -> dict[str, Any]:
    """A workflow of the wrapper's ids, to the latents of 5 frames: 17B, a reference image, speech."""
    texts = {"positive_prompt": "a man", "negative_prompt": "bad", "t5": ["t5", 0]}
    humo = {
        "num_frames": 5,
        "width": 80,
        "height": 64,
        "audio_scale": 1.0,
        "audio_cfg_scale": 5.5,
        "audio_start_percent": 0.0,
        "audio_end_percent": 1.0,
        "vae": ["vae", 0],
        "whisper_model": ["whisper", 0],
        "reference_images": ["image", 0],
        "audio": ["audio", 0],
    }
    sampler = {
        "steps": 2,
        "cfg": 5.0,
        "shift": 5.0,
        "seed": 1,
        "force_offload": True,
        "scheduler": "unipc",
        "riflex_freq_index": 0,
        "model": ["model", 0],
        "image_embeds": ["humo", 0],
        "text_embeds": ["text", 0],
    }
    loader = {"base_precision": "fp32", "quantization": "disabled", "load_device": "offload_device"}
    whisper = {"model": humo_name(tiny.whisper), "base_precision": "fp32", "load_device": "main_device"}
    nodes = {
        "model": ("WanVideoModelLoader", {"model": humo_name(tiny.humo), "attention_mode": "sdpa", **loader}),
        "vae": ("WanVideoVAELoader", {"model_name": humo_name(tiny.vae), "precision": "fp32"}),
        "t5": ("LoadWanVideoT5TextEncoder", {"model_name": humo_name(tiny.text_encoder), "precision": "fp32"}),
        "text": ("WanVideoTextEncode", texts),
        "whisper": ("WhisperModelLoader", whisper),
        "image": ("LoadImage", {"image": "portrait.png"}),
        "audio": ("LoadAudio", {"audio": "humo.wav"}),
        "humo": ("HuMoEmbeds", humo),
        "sampler": ("WanVideoSampler", sampler),
    }
    return {node_id: {"class_type": kind, "inputs": inputs} for node_id, (kind, inputs) in nodes.items()}


def shrink(
    prompt: dict[str, Any], *, size: int = 64, window: int = 17, frames: int = 25, steps: int = 2
) -> dict[str, Any]:
    """The same workflow, quick enough for a test."""
    for node in prompt.values():
        inputs = node["inputs"]
        for name, value in (("width", size), ("height", size), ("steps", steps)):
            if name in inputs:
                inputs[name] = value
        if "frame_window_size" in inputs:
            inputs["frame_window_size"] = window
        if node["class_type"] in ("InfiniteTalkSpeech", "InfiniteTalkHuMo"):
            inputs["num_frames"] = frames
        if inputs.get("start_step"):
            inputs["start_step"] = 1
    return prompt


def node_of(prompt: dict[str, Any], class_type: str) -> str:
    """Id of the one node of a type."""
    (found,) = [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]
    return found


# Node -> its widgets and sockets that InfiniteTalk Preset has an output for.
PRESET_LINKS = {
    "InfiniteTalkSampler": ("steps", "cfg", "shift", "scheduler"),
    "InfiniteTalkSpeech": ("audio_cfg_scale",),
    "InfiniteTalkModelLoader": ("quantization", "block_swap_args"),
    "InfiniteTalkLongVideo": ("tiled_vae", "frame_window_size", "motion_frame", "colormatch", "mode"),
    "InfiniteTalkTextEncode": ("device",),
}


def link_preset(prompt: dict[str, Any], preset: str, outputs: Sequence[str]) -> None:
    """Give the nodes of `prompt` the settings of a preset; `outputs` are the names of the preset node's, in order.

    The length of windows stays what `shrink` made it.
    """
    prompt["900"] = {"class_type": "InfiniteTalkPreset", "inputs": {"preset": preset}}
    for class_type, names in PRESET_LINKS.items():
        for name in names:
            if name == "frame_window_size":
                continue
            prompt[node_of(prompt, class_type)]["inputs"][name] = ["900", list(outputs).index(name)]
