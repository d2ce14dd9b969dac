"""Reading checkpoint files: safetensors, PyTorch pickles (weights only) and GGUF.

What a file is, its first bytes say and not its name. A checkpoint in several parts is one file here (`shards.py`).
A file opened here answers with names, shapes and dtypes without reading a weight; tensors are then read one at a time,
each into memory of its own (a fresh allocation is 64-byte aligned), because views into a mapped file start at any byte
and a 16-byte GPU kernel must not see them.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, some
from ..linear.gguf import GGUFTensor
from .gguf import open_gguf
from .reading import Format, format_of, reading
from .shards import parts_of

logger = logging.getLogger(__name__)

# Called with (bytes read, bytes in the file) after each tensor.
Progress = Callable[[int, int], None]

# A tensor, or the packed blocks of one in a GGUF file.
Stored = Tensor | GGUFTensor

_ENDINGS = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    ".pth": "PyTorch",
    ".pt": "PyTorch",
    ".bin": "PyTorch",
    ".ckpt": "PyTorch",
    ".gguf": "GGUF",
}

# What only the tensors of another quantization are called: part of the name -> who writes it. None of them is read.
_OTHER_QUANTIZATIONS = (
    (".weight._data", "quanto"),
    (".quant_state.bitsandbytes__", "bitsandbytes"),
    (".weight.absmax", "bitsandbytes"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".W_q", "HQQ"),
)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


LONGEST_NAME = 400
"""Characters of a tensor's name. Sentences repeat names, so that a longer one is rejected where the file is opened."""


def own_memory(tensor: Tensor, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy of `tensor` on `device` in storage that nothing else shares, starting at its first byte."""
    target = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
    return target.copy_(tensor)


@dataclass(frozen=True)
class _Part:
    """One file of a checkpoint: names and shapes, and how to get a tensor as it lies in the file."""

    path: Path
    shapes: Mapping[str, Stored]
    get: Callable[[str], Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)


def _joined(first: str, second: str) -> str:
    """One metadata text of two parts: their JSON objects become one, two levels deep.

    The header of each part may list its own layers alone. A text that is no JSON object stays for its reader to reject.
    """
    if first == second:
        return first
    objects = []
    for text in (first, second):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if not isinstance(content, dict):
            return text
        objects.append(content)
    whole = objects[0]
    for key, value in objects[1].items():
        before = whole.get(key)
        whole[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return json.dumps(whole)


class CheckpointFile:
    """An open checkpoint: `shapes` at once, each tensor when asked for.

    `shapes` maps every name to what has its shape and dtype (a tensor on the meta device, or the mapped one);
    `metadata` is the text that a safetensors or GGUF header carries. `path` may also be the index of a checkpoint in
    parts, a folder with one, or one of the parts. Raises CheckpointError when the file is missing, damaged, or of a
    format that is not supported. Use as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Stored] = {}
        self._where: dict[str, _Part] = {}
        for part in map(_open, parts_of(self.path)):
            twice = self.shapes.keys() & part.shapes.keys()
            if twice:
                raise CheckpointError(f"Two parts of {self.path} hold {some(sorted(twice))}; download them again.")
            for key, text in part.metadata.items():
                self.metadata[key] = _joined(self.metadata.get(key, text), text)
            self.shapes |= part.shapes
            self._where |= dict.fromkeys(part.shapes, part)
        if not self.shapes:
            raise CheckpointError(f"{self.path} holds no tensors; download it again.")
        longest = max(map(len, self.shapes))
        if longest > LONGEST_NAME:
            raise CheckpointError(f"{self.path} holds a tensor whose name has {longest:,} characters; it is damaged.")
        _reject_other_quantizations(self.path, self.shapes)

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name` in memory of its own on `device`, cast to `dtype` where one is given.

        Packed tensors of a GGUF file are unpacked, to bfloat16 where no dtype is given.
        """
        tensor = self.mapped(name)
        if isinstance(tensor, GGUFTensor):
            return tensor.dequantize(dtype or torch.bfloat16, device)
        return own_memory(tensor, device, dtype)

    def mapped(self, name: str) -> Stored:
        """The tensor as it lies in the file: at any byte, and valid only while the file stays as it is."""
        if not self._where:
            raise ValueError(f"{self.path} is closed")
        part = self._where[name]
        with reading(part.path):
            return part.get(name)

    def close(self) -> None:
        self._where = {}

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _open(path: Path) -> _Part:
    with reading(path):
        with path.open("rb") as file:
            head = file.read(64)
        form = format_of(head)
        if form == "safetensors":
            return _open_safetensors(path)
        if form == "gguf":
            content = open_gguf(path)
            return _Part(path, content.tensors, content.tensors.__getitem__, content.metadata)
        if form in ("zip", "pickle"):
            loaded = _load_pickle(path, form)
            return _Part(path, loaded, loaded.__getitem__)
    raise _unknown(path, head)


def _unknown(path: Path, head: bytes) -> CheckpointError:
    """What to say of a file whose first bytes are those of no model."""
    if not head:
        return CheckpointError(f"{path} is empty; download it again.")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{path} is a Git LFS pointer, not the model itself; run 'git lfs pull' or download the file."
        )
    if head.lstrip()[:1] == b"<":
        return CheckpointError(f"{path} is a web page, not a model; the download was answered with HTML, try it again.")
    suffix = path.suffix.lower()
    if suffix in _ENDINGS:
        return CheckpointError(
            f"{path} does not begin as a {_ENDINGS[suffix]} file does: it is damaged or was not downloaded completely; "
            "download it again and compare its size."
        )
    return CheckpointError(
        f"{path} is no model file: it begins as none, and has an unknown ending '{path.suffix}' (model files end in "
        f"{', '.join(_ENDINGS)})."
    )


def _open_safetensors(path: Path) -> _Part:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # the library takes no other paths
        raise CheckpointError(f"The name of {path} is no valid UTF-8; rename it.") from error
    file = safe_open(str(path), framework="pt", device="cpu")
    shapes: dict[str, Stored] = {}
    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
        piece = file.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{path} stores {name} as {piece.get_dtype()}, a type that this program does not read."
            )
        shapes[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    return _Part(path, shapes, file.get_tensor, dict(file.metadata() or {}))


def _reject_other_quantizations(path: Path, names: Mapping[str, Stored]) -> None:
    for name in names:
        for mark, writer in _OTHER_QUANTIZATIONS:
            if mark in name:
                raise CheckpointError(
                    f"{path} is quantized by {writer} ({name}), which is not supported; use a bf16, fp8 or GGUF file "
                    "of this model."
                )


def read_state_dict(
    path: str | Path, device: str | torch.device = "cpu", *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pth/.pt or .gguf file, in their stored dtypes, names as in the file.

    The packed tensors of a GGUF file come unpacked, in bfloat16.

    Each tensor lies contiguous in memory of its own on `device`. Raises CheckpointError, one sentence, for a file that
    is missing, truncated, a folder, a Git LFS pointer, unsafe to unpickle, or of an unknown format.
    """
    begin = time.monotonic()
    with CheckpointFile(path) as file:
        total = sum(tensor.nbytes for tensor in file.shapes.values())
        state: dict[str, Tensor] = {}
        done = 0
        for name, shape in file.shapes.items():
            state[name] = file.read(name, device)
            done += shape.nbytes
            if progress is not None:
                progress(done, total)
    seconds = time.monotonic() - begin
    logger.info("Read %s: %d tensors, %.2f GiB in %.1f s", Path(path).name, len(state), total / 2**30, seconds)
    return state


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors or GGUF header; {} for pickles."""
    with CheckpointFile(path) as file:
        return file.metadata


# ------------------------------------------------------------------------------------------------------------- pickles


def _load_pickle(path: Path, form: Format) -> dict[str, Stored]:
    """The tensors of a state dict from torch.save, unpickled with weights_only, mapped where the file allows it."""
    try:
        # Files of the format before torch 1.6 and compressed ones cannot be mapped.
        mapped = form == "zip" and _is_stored_plain(path) and not path.name.endswith(".safetensors")
        if mapped:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            _check_sizes(path)
        else:
            with path.open("rb") as file:  # torch chooses another reader by the name of a path
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("Unsupported global", "Unsupported class", "Trying to")):
            raise CheckpointError(
                f"{path} holds more than tensors and is not unpickled, because that could run foreign code; "
                "use a safetensors version of it."
            ) from error
        raise
    # Trainers wrap the weights: {"state_dict": {...}} or {"model": {...}}.
    for key in ("state_dict", "model_state", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__} instead of a table of named weights.")
    tensors = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return {**tensors}


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless each value of the tensor is stored, by itself and as a number."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_complex() or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path} stores {name} as {list(tensor.shape)} of {tensor.dtype} in another form than plain numbers "
            "(sparse, quantized, complex, expanded or empty), which is not read; use a safetensors version of it."
        )


def _is_stored_plain(path: Path) -> bool:
    """Whether nothing in the archive of torch.save is compressed; CheckpointError for another archive."""
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path} is a zip archive, but none that PyTorch has written; name the model file.")
        return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def _check_sizes(path: Path) -> None:
    """Raise CheckpointError where a tensor is stated larger or smaller than what the archive holds for it.

    torch does not ask when it maps a file: such a tensor would run on into the bytes behind.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
        table = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(table) as file:
            states = _Sizes(file)
            states.load()
    for key, stated in states.stated.items():
        held = sizes.get(f"data/{key}", 0)
        if held != stated:
            raise CheckpointError(
                f"{path} is damaged: it states {stated} bytes for a tensor and holds {held}; download it again."
            )


_STORAGES = {
    "BFloat16Storage": 2,
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "IntStorage": 4,
    "LongStorage": 8,
    "ShortStorage": 2,
    "UntypedStorage": 1,
}
"""What pickles call the dtype of a tensor -> bytes of a number."""


class _Blank(dict[Any, Any]):
    """Stands for every class and function that a pickle names: takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Blank:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Blank:
        return self

    def append(self, item: object) -> None:
        pass


class _Sizes(pickle.Unpickler):
    """Reads from a pickle of torch.save how many bytes it states for each storage; nothing that it names is run."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.stated: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> type[_Blank]:
        return type(name, (_Blank,), {})

    def persistent_load(self, pid: Any) -> _Blank:
        _, kind, key, _, count = pid
        if kind.__name__ in _STORAGES:
            self.stated[str(key)] = int(count) * _STORAGES[kind.__name__]
        return _Blank()
