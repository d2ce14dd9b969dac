"""Stand-ins for the parts of ComfyUI that the pack imports: the V3 schema classes, folders, memory management.

They follow ComfyUI's public interface closely enough that the same node classes run; what ComfyUI itself makes of the
nodes is tried by tests/comfyui with the real one.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# --- comfy_api.latest.io -----------------------------------------------------------------------------------------


class Hidden(enum.Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"


OPTIONS = frozenset(
    {
        "default",
        "display_mode",
        "force_input",
        "lazy",
        "max",
        "min",
        "multiline",
        "options",
        "placeholder",
        "round",
        "socketless",
        "step",
        "upload",
    }
)
"""Keywords that the inputs of ComfyUI 0.3.64 take, which is the oldest version that the pack is for."""


class Input:
    """An input socket or widget; what is None is left out of its options."""

    io_type = "*"

    def __init__(self, id: str, *, optional: bool = False, tooltip: str | None = None, **options: Any) -> None:
        if not options.keys() <= OPTIONS:
            raise TypeError(f"{id}: ComfyUI 0.3.64 does not take {options.keys() - OPTIONS}")
        self.id, self.optional, self.tooltip = id, optional, tooltip
        self.extra_dict: dict[str, Any] = {}
        self.options = options

    def get_io_type(self) -> str:
        return self.io_type

    def as_dict(self) -> dict[str, Any]:
        given = {"tooltip": self.tooltip, **self.options, **self.extra_dict}
        return {name: value for name, value in given.items() if value is not None}


class Output:
    io_type = "*"

    def __init__(self, *, display_name: str | None = None, tooltip: str | None = None) -> None:
        self.display_name, self.tooltip = display_name, tooltip


def Custom(io_type: str) -> Any:
    return type(
        io_type,
        (),
        {
            "io_type": io_type,
            "Input": type("Input", (Input,), {"io_type": io_type}),
            "Output": type("Output", (Output,), {"io_type": io_type}),
        },
    )


@dataclasses.dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = ""
    inputs: list[Input] = dataclasses.field(default_factory=list)
    outputs: list[Output] = dataclasses.field(default_factory=list)
    hidden: list[Hidden] = dataclasses.field(default_factory=list)
    description: str = ""
    is_output_node: bool = False
    search_aliases: list[str] = dataclasses.field(default_factory=list)


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def check_lazy_status(cls, **inputs: Any) -> list[str]:
        return [name for name, value in inputs.items() if value is None]

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        schema = cls.define_schema()
        ids = [i.id for i in schema.inputs]
        assert len(set(ids)) == len(ids), f"{schema.node_id} names an input twice"
        return schema


class ComfyExtension:
    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


_TYPES = {
    "Int": "INT",
    "Float": "FLOAT",
    "String": "STRING",
    "Boolean": "BOOLEAN",
    "Combo": "COMBO",
    "Image": "IMAGE",
    "Mask": "MASK",
    "Audio": "AUDIO",
    "Latent": "LATENT",
    "Sigmas": "SIGMAS",
    "Conditioning": "CONDITIONING",
    "ClipVision": "CLIP_VISION",
    "Video": "VIDEO",
    "Model": "MODEL",
}


def _io() -> types.ModuleType:
    module = types.ModuleType("comfy_api.latest.io")
    module.__dict__.update({name: Custom(io_type) for name, io_type in _TYPES.items()})
    for thing in (Hidden, Input, Output, Custom, Schema, NodeOutput, ComfyNode):
        setattr(module, thing.__name__, thing)
    return module


# --- folder_paths ------------------------------------------------------------------------------------------------


def _folder_paths(base: Path) -> types.ModuleType:
    module = types.ModuleType("folder_paths")
    suffixes = {".safetensors", ".pth", ".pt", ".bin"}
    kinds = (
        "diffusion_models",
        "model_patches",
        "vae",
        "vae_approx",
        "text_encoders",
        "clip_vision",
        "loras",
        "audio_encoders",
    )
    folders = {kind: ([str(base / "models" / kind)], suffixes) for kind in kinds}
    folders["custom_nodes"] = ([str(base / "custom_nodes")], set())

    def get_filename_list(kind: str) -> list[str]:
        roots, endings = folders[kind]
        found = [p.relative_to(root) for root in roots for p in Path(root).rglob("*") if p.suffix in endings]
        return sorted(str(path) for path in found)

    def get_full_path(kind: str, name: str) -> str | None:
        return next((str(Path(root) / name) for root in folders[kind][0] if (Path(root) / name).is_file()), None)

    module.__dict__.update(
        models_dir=str(base / "models"),
        supported_pt_extensions=suffixes,
        folder_names_and_paths=folders,
        get_folder_paths=lambda kind: list(folders[kind][0]),
        get_filename_list=get_filename_list,
        get_full_path=get_full_path,
        get_output_directory=lambda: str(base / "output"),
        get_input_directory=lambda: str(base / "input"),
        get_user_directory=lambda: str(base / "user"),
    )
    return module


# --- comfy: memory management, progress, previews ----------------------------------------------------------------


class InterruptProcessingException(Exception):
    pass


class ModelPatcher:
    """The surface that memory management uses."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.parent = None


class Management(types.ModuleType):
    """comfy.model_management, remembering what it was asked."""

    InterruptProcessingException = InterruptProcessingException

    def __init__(self) -> None:
        super().__init__("comfy.model_management")
        self.interrupted = False
        self.interrupt_after: int | None = None  # number of checks to let pass
        self.current_loaded_models: list[ModelPatcher] = []

    def get_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def load_models_gpu(self, models: list[Any], memory_required: float = 0) -> None:
        for model in models:
            assert model.model_size() > 0
            if model not in self.current_loaded_models:
                self.current_loaded_models.insert(0, model)
            model.partially_load(model.load_device, 1e32, force_patch_weights=False)

    def unload_all_models(self) -> None:
        for model in self.current_loaded_models:
            model.detach(True)
        self.current_loaded_models = []

    def soft_empty_cache(self) -> None:
        pass

    def interrupt_current_processing(self, value: bool = True) -> None:
        self.interrupted = value

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            self.interrupted |= self.interrupt_after < 0
        if self.interrupted:
            self.interrupted, self.interrupt_after = False, None
            raise InterruptProcessingException


class Progress:
    """Collects what progress bars showed: (done, total, whether with a preview)."""

    seen: list[tuple[float, float, bool]] = []  # noqa: RUF012

    def __init__(self, total: float) -> None:
        self.total = total

    def update_absolute(self, value: float, total: float | None = None, preview: Any = None) -> None:
        self.seen.append((value, self.total if total is None else total, preview is not None))


class _Previewer:
    def decode_latent_to_preview_image(self, form: str, latents: torch.Tensor) -> tuple[str, Any, int]:
        assert latents.ndim == 5
        assert latents.shape[:3] == (1, 16, 1)
        image = latents[0, :3, 0].clone()
        latents.fill_(float("nan"))  # ComfyUI's may write to what it is given
        return form, image, 512


def _comfy() -> dict[str, types.ModuleType]:
    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content)
        return made

    management = Management()
    parts = {
        "comfy": module("comfy"),
        "comfy.model_management": management,
        "comfy.model_patcher": module("comfy.model_patcher", ModelPatcher=ModelPatcher),
        "comfy.utils": module("comfy.utils", ProgressBar=Progress),
        "comfy.latent_formats": module("comfy.latent_formats", Wan21=object),
        "latent_preview": module("latent_preview", get_previewer=lambda device, form: _Previewer()),
    }
    for name, part in parts.items():
        if name.startswith("comfy."):
            setattr(parts["comfy"], name.removeprefix("comfy."), part)
    return parts


def install(base: Path) -> Callable[[], None]:
    """Put the stand-ins where `import` finds them, with `base` as ComfyUI's folder; returns what takes them away."""
    io = _io()
    latest = types.ModuleType("comfy_api.latest")
    latest.__dict__.update(io=io, ComfyExtension=ComfyExtension)
    api = types.ModuleType("comfy_api")
    api.__dict__.update(latest=latest)
    modules = {
        "comfy_api": api,
        "comfy_api.latest": latest,
        "comfy_api.latest.io": io,
        "folder_paths": _folder_paths(base),
        **_comfy(),
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)

    def remove() -> None:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module

    return remove
