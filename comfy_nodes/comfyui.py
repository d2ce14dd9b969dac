"""All that this pack asks of ComfyUI: node schemas, model folders, memory management, progress, previews, interruption.

No other file imports ComfyUI. What differs between its versions is detected by asking for the feature, never by
comparing version numbers.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension as ComfyExtension
from comfy_api.latest import io as io
from torch import Tensor, nn

from ..wanvideo.errors import BackendUnavailableError, CheckpointError, InfiniteTalkError, InputError
from ..wanvideo.runtime.offload import BlockSwap, Offloader

logger = logging.getLogger(__name__)

# ComfyUI shows an error's class behind its module, which for a pack is a path on this machine; Python's own without.
for _error in (BackendUnavailableError, CheckpointError, InfiniteTalkError, InputError):
    _error.__module__ = "builtins"

# --- node schemas ------------------------------------------------------------------------------------------------


def make_schema(newer: dict[str, Any], **fields: Any) -> Any:
    """An io.Schema of `fields`, and of those in `newer` that this ComfyUI knows."""
    return io.Schema(**fields, **{name: newer[name] for name in newer.keys() & io.Schema.__dataclass_fields__.keys()})


def advanced(widget: Any) -> Any:
    """Mark a widget as advanced: an attribute in newer ComfyUI, an entry of its options before."""
    if hasattr(widget, "advanced"):
        widget.advanced = True
    else:
        widget.extra_dict["advanced"] = True
    return widget


# --- model folders -----------------------------------------------------------------------------------------------

# Kinds of files as the loaders name them -> the folders of ComfyUI that hold them.
FOLDERS = {
    "dit": ("diffusion_models", "unet_gguf"),
    "adapter": ("diffusion_models", "unet_gguf", "model_patches"),
    "vae": ("vae",),
    "small_decoder": ("vae_approx",),
    "text_encoder": ("text_encoders",),
    "clip_vision": ("clip_vision",),
    "clip": ("clip_vision", "text_encoders"),
    "loras": ("loras",),
    "wav2vec": ("wav2vec2", "audio_encoders"),
    "whisper": ("audio_encoders",),
}


def register_folders() -> None:
    """Register the folders that ComfyUI lacks: models/wav2vec2, and GGUF files among the diffusion models."""
    known = folder_paths.folder_names_and_paths
    wav2vec = os.path.join(folder_paths.models_dir, "wav2vec2")
    folders, endings = known.get("wav2vec2", ([], folder_paths.supported_pt_extensions))  # extra_model_paths.yaml's
    known["wav2vec2"] = ([*folders, *([] if wav2vec in folders else [wav2vec])], set(endings))
    if "unet_gguf" not in known:
        known["unet_gguf"] = (folder_paths.get_folder_paths("diffusion_models"), {".gguf"})


def model_files(kind: str) -> list[str]:
    """Names of all files of a kind, for a combo."""
    names: list[str] = []
    for folder in FOLDERS[kind]:
        if folder in folder_paths.folder_names_and_paths:
            names += [name for name in folder_paths.get_filename_list(folder) if name not in names]
    return names


def model_path(kind: str, name: str) -> Path:
    """The file behind a combo's value. Raises CheckpointError, naming the folders, when it is gone."""
    for folder in FOLDERS[kind]:
        path = folder_paths.get_full_path(folder, name) if folder in folder_paths.folder_names_and_paths else None
        if path is not None:
            return Path(path)
    places = ", ".join(f"models/{folder}" for folder in FOLDERS[kind] if folder != "unet_gguf")
    raise CheckpointError(f"There is no file '{name}' in ComfyUI's {places}: put it there or choose another.")


def hub_folder(repo_id: str) -> Path:
    """A Hugging Face model folder, found in ComfyUI's folders for speech models or downloaded into the first of them.

    Raises CheckpointError when it is neither there nor reachable.
    """
    name = repo_id.rpartition("/")[2]
    known = [kind for kind in FOLDERS["wav2vec"] if kind in folder_paths.folder_names_and_paths]
    folders = [Path(folder) for kind in known for folder in folder_paths.get_folder_paths(kind)]
    places = [folder / part for folder in folders for part in (name, repo_id)]
    for place in (*places, Path(folder_paths.models_dir) / "transformers" / repo_id):
        if (place / "config.json").is_file():
            return place
    target = folders[0] / name
    from huggingface_hub import snapshot_download

    logger.info("downloading %s to %s", repo_id, target)
    try:
        snapshot_download(repo_id, local_dir=str(target), ignore_patterns=["*.msgpack", "*.h5", "*.onnx"])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repo_id} is not in {target} and cannot be downloaded ({type(error).__name__}): "
            "download it by hand and put its files there."
        ) from error
    return target


def output_path(name: str) -> Path:
    """A path inside ComfyUI's output folder, for `name` as a user typed it. Raises InputError when it leads outside."""
    root = Path(folder_paths.get_output_directory()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or path == root:
        raise InputError(f"output_path '{name}' leads outside ComfyUI's output folder: give a name inside it.")
    return path


def cache_folder(name: str) -> Path:
    """A folder of this pack in ComfyUI's user directory, made when missing."""
    path = Path(folder_paths.get_user_directory()) / "wanvideo_infinitetalk" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- other packs -------------------------------------------------------------------------------------------------


def custom_node_folders() -> list[Path]:
    """Folders of all packs that are installed beside this one, and that ComfyUI will load or has loaded.

    Not this pack's own, whatever name it was put under.
    """
    own = Path(__file__).resolve().parents[1]
    places = [Path(place) for place in folder_paths.get_folder_paths("custom_nodes")]
    found = [folder for place in places if place.is_dir() for folder in sorted(place.iterdir())]
    return [folder for folder in found if folder.is_dir() and folder.resolve() != own]


def is_registered(node_id: str) -> bool:
    """Whether a pack that was loaded before has a node of this id."""
    return node_id in getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


async def register_replacement(old_id: str, schema: Any) -> None:
    """Let a newer ComfyUI offer the node of `schema` for one that is missing, with the same inputs and outputs."""
    if hasattr(io, "NodeReplace"):
        from comfy_api.latest import ComfyAPI

        widgets = [widget.id for widget in schema.inputs if isinstance(widget, io.WidgetInput)]
        await ComfyAPI().node_replacement.register(io.NodeReplace(schema.node_id, old_id, widgets))


# --- devices and memory ------------------------------------------------------------------------------------------


def device(choice: str = "main_device") -> torch.device:
    """What "main_device" ("gpu") and "offload_device" ("cpu") mean on this machine."""
    if choice in ("offload_device", "cpu"):
        return torch.device("cpu")
    return torch.device(management.get_torch_device())


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Run without gradients and outside ComfyUI's inference mode.

    Tensors made in inference mode cannot change their storage afterwards, which is how weights move between host and
    device.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Patcher(ModelPatcher):
    """What ComfyUI's memory management sees of a model whose weights an Offloader moves."""

    def __init__(self, offloader: Offloader) -> None:
        self.offloader = offloader
        super().__init__(offloader.model, offloader.device, torch.device("cpu"))

    def model_size(self) -> int:
        return self.offloader.device_bytes

    def loaded_size(self) -> int:
        return self.offloader.loaded_bytes

    def current_loaded_device(self) -> torch.device:
        device: torch.device = self.load_device if self.offloader.loaded else self.offload_device
        return device

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False, **_: Any
    ) -> int:
        before = self.offloader.loaded_bytes
        with ordinary_tensors():
            self.offloader.load()
        return self.offloader.loaded_bytes - before

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, *_: Any, **__: Any) -> int:
        return 0  # whole or not at all: how much stays in host memory is block swap's business

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        if unpatch_all:
            self.unpatch_model()
        return self.offloader.model

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            with ordinary_tensors():
                self.offloader.unload()

    def lowvram_patch_counter(self) -> int:
        return 0


class Resident:
    """A module under ComfyUI's memory management: other models unload for it, and it unloads for them."""

    def __init__(self, module: nn.Module, load_device: torch.device, swap: BlockSwap | None = None) -> None:
        self.offloader = Offloader(module, load_device, swap)
        self._patcher = _Patcher(self.offloader)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.offloader.device

    def load(self, working_bytes: int = 0) -> None:
        """Bring it to its device, with `working_bytes` free for its work; others are unloaded as needed."""
        management.load_models_gpu([self._patcher], memory_required=working_bytes)

    def unload(self) -> None:
        """Back to host memory."""
        self._patcher.unpatch_model()
        if self.device.type != "cpu":
            management.soft_empty_cache()

    def set_swap(self, swap: BlockSwap | None) -> None:
        with ordinary_tensors():
            self.offloader.set_swap(swap)


# --- while it runs -----------------------------------------------------------------------------------------------


def stop_if_interrupted() -> None:
    """Raise ComfyUI's interruption when the user pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


class Progress:
    """ComfyUI's progress bar on the running node, with a preview of latents where previews are switched on."""

    def __init__(self, total: int, preview_device: torch.device | None = None) -> None:
        self._bar = comfy.utils.ProgressBar(total)
        self._previewer = None if preview_device is None else _previewer(preview_device)

    def __call__(self, done: int, total: int, latents: Tensor | None = None) -> None:
        """`done` of `total`; `latents` [C, T, h, w] is the current guess of the clean video."""
        stop_if_interrupted()
        preview = None
        if latents is not None and self._previewer is not None and latents.shape[0] == 16:
            # A copy: ComfyUI's previewer may write to what it is given (reported in its issue 13366).
            middle = latents[None, :, latents.shape[1] // 2].unsqueeze(2).to(torch.float32, copy=True)
            preview = self._previewer.decode_latent_to_preview_image("JPEG", middle)
        self._bar.update_absolute(done, max(total, 1), preview)


def _previewer(preview_device: torch.device) -> Any:
    """ComfyUI's previewer for Wan2.1 latents, None where its preview method is "none"."""
    import comfy.latent_formats
    import latent_preview

    return latent_preview.get_previewer(preview_device, comfy.latent_formats.Wan21())


# --- objects of core nodes ---------------------------------------------------------------------------------------


def with_attention(model: Any, compute: Callable[..., Tensor]) -> Any:
    """A core MODEL with the same weights whose attention is `compute(core's own, q, k, v, heads, **options)`."""
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    if "optimized_attention_override" in options:
        logger.warning("The attention that another node gave this model is replaced.")
    options["optimized_attention_override"] = compute
    return patched


def clip_hidden_states(clip_vision: Any, image: Tensor, crop: str) -> Tensor:
    """Penultimate hidden states [B, tokens, width] of a core CLIP_VISION model; image [B, H, W, 3] in [0, 1]."""
    output = clip_vision.encode_image(image, crop=crop)
    hidden: Tensor = output.penultimate_hidden_states
    return hidden
