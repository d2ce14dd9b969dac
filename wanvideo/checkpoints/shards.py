"""Checkpoints in several files: Hugging Face's parts (`model-00001-of-00007.safetensors`) and their index.

The index, the folder that holds one, or any of the parts stand for the whole; so does a folder in which a model has the
name that diffusers gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError, some
from .reading import check_regular, json_object

__all__ = ["index_in", "parts_of"]

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<ending>\.\w+)")

_MODEL_ENDINGS = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")

MAX_PARTS = 1000

_DIFFUSERS_MODEL = "diffusion_pytorch_model.safetensors"
"""The one file of a model's folder, beside which there may be those of other models."""


def index_in(folder: Path) -> Path | None:
    """The index of a checkpoint in parts that `folder` holds, None without one. CheckpointError for several."""
    found = sorted(path for path in folder.glob("*.index.json") if path.is_file())
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds several models ({some([path.name for path in found])}); name one.")
    return found[0] if found else None


def parts_of(path: Path) -> list[Path]:
    """The files that make up the checkpoint `path`: itself, or all parts in order.

    Raises CheckpointError where `path` is a folder with neither an index nor a file of diffusers' name, is no regular
    file, or parts are missing.
    """
    if path.is_dir():
        index = index_in(path)
        if index is None and (path / _DIFFUSERS_MODEL).is_file():
            return [path / _DIFFUSERS_MODEL]
        if index is None:
            inside = sorted(item.name for item in path.iterdir() if item.suffix.lower() in _MODEL_ENDINGS)
            hint = f"name the model file inside it ({some(inside)})" if inside else "it holds no model file"
            raise CheckpointError(f"{path} is a folder; {hint}.")
        return _parts_of_index(index)
    check_regular(path)
    if path.suffix.lower() == ".json":
        return _parts_of_index(path)
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        return [path]
    names = [f"{match['stem']}-{number:05}-of-{match['count']}{match['ending']}" for number in range(1, count + 1)]
    return _present(path.parent, names, path)


def _parts_of_index(index: Path) -> list[Path]:
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index} is no index of a model in parts (it has no 'weight_map' from tensors to files); name the model "
            "file."
        )
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if re.search(r"[/\\:]", name) or name in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{index} names the file {outside[0]!r}, which is not in its folder; download it again.")
    return _present(index.parent, names, index)


def _present(folder: Path, names: Iterable[str], stated_by: Path) -> list[Path]:
    paths = [folder / name for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{stated_by} belongs to a model in {len(paths)} files, of which {len(missing)} are missing in {folder}: "
            f"{some(missing, 8)}; download them too."
        )
    for path in paths:
        check_regular(path)
    return paths
