"""What the weights of a checkpoint are worth: the one rule for quantized weights and their scales, for every model.

A quantized weight `<layer>.weight` is stored with what belongs to it:

* `<layer>.scale_weight` or `<layer>.weight_scale`: weight = stored * scale. One float value, or one per output row; for
  nvfp4 and mxfp8 one per block of 16 or 32 along the input, in the tiled order of cuBLAS (mxfp8 also row by row, where
  the shape says so). `<layer>.weight_scale_2` is nvfp4's second scale, one float value.
* `<layer>.comfy_quant`, JSON in bytes, or an entry of `_quantization_metadata` in the safetensors header: the format.
  float8 needs neither, its dtype says it. A marker `scaled_fp8` says that there are scales.
* `<layer>.scale_input` or `<layer>.input_scale`: for activations. Not used; they get a scale per row here.

GGUF blocks hold their scales themselves. Everything else that looks like part of a quantized weight is an error, found
before a weight is read: a scale left out changes a weight by orders of magnitude without a fault.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.quantizers import NVFP4_BLOCK
from ..linear.gguf import GGUFTensor
from ..linear.nvfp4 import dequantize_nvfp4, nvfp4_storage_shapes, tile_padded, untiled
from .files import CheckpointFile, Stored
from .state_dict import bare_names, kind_of

__all__ = ["FORMATS", "HEADER", "StoredWeight", "Weights"]

HEADER = "_quantization_metadata"
"""In the metadata of a safetensors file: {"format_version": "1.0", "layers": {"<layer>": {"format": ...}, ...}}."""

FORMATS: dict[str, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "nvfp4": torch.uint8,
    "mxfp8": torch.float8_e4m3fn,
    "int8_tensorwise": torch.int8,
}
"""ComfyUI's names of the formats that are read -> what a weight is stored as."""

MXFP8_BLOCK = 32
"""Values along the input that share one scale, a power of two."""

_BLOCKS = {"nvfp4": NVFP4_BLOCK, "mxfp8": MXFP8_BLOCK}

_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale")
_PARTS = (*_SCALES, *_UNUSED, "weight_scale_2", "comfy_quant")
_MARKER = "scaled_fp8"

# What may stand beside `<layer>.weight` and is no part of it: of linears, convolutions, norms, and batch norms.
_BESIDE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_g", "weight_v")

# Last parts of names that savers of quantized files use, and names like them that mean something else.
_LEFTOVER = re.compile(
    r"(.*_)?(scales?|zeros?|zero_points?|absmax|quant_map|quant_state|quant_type|codebook)|scale_.*|qweight|g_idx|SCB|"
    r"_data|_scale|_shift|comfy_.*|bitsandbytes__.*"
)
_HARMLESS = ("logit_scale", "log_scale", "scale_shift_table")

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ANOTHER = "use another version of the file, in 16 bits for instance"
_LONGEST_MARK = 1 << 16
"""Bytes of a `comfy_quant`; real ones have some twenty."""

# What a mark may say: nothing here but the format changes what the weight is worth.
_MARK_FIELDS = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape")


class Reader(Protocol):
    """Reads the tensor of that name in the file; packed GGUF tensors come unpacked, in `dtype`."""

    def __call__(self, name: str, device: Any = ..., dtype: torch.dtype | None = ...) -> Tensor: ...


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a checkpoint and what belongs to it.

    Attributes:
        name: in the file. stored: its shape and dtype there.
        format: one of FORMATS, "gguf", or None for a tensor that is worth what it holds.
        scale, scale_2: names of its scales in the file, None without.
        full_precision: whether the file asks for a matmul with the unpacked weight, whatever the device has.
    """

    name: str
    stored: Stored
    format: str | None = None
    scale: str | None = None
    scale_2: str | None = None
    full_precision: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the values; that of nvfp4 counts the padding to multiples of 16."""
        if self.format == "nvfp4":
            return torch.Size((self.stored.shape[0], 2 * self.stored.shape[1]))
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes stored, without the scales."""
        return self.stored.nbytes

    def is_floating_point(self) -> bool:
        """Whether the values are, however they are stored."""
        return self.format is not None or self.stored.is_floating_point()

    def fits(self, shape: torch.Size) -> bool:
        """Whether this is a weight of that shape."""
        if self.format == "nvfp4":
            return len(shape) == 2 and tuple(self.stored.shape) == nvfp4_storage_shapes(*shape)[0]
        return self.stored.shape == shape


class Weights(Mapping[str, Tensor]):
    """The tensors of one model in a checkpoint, without the parts of quantized weights, which are applied.

    `weights[name]` reads a tensor: as it is stored, or in float32 where it is quantized. `stored[name]` says how it is
    stored without reading it.
    """

    def __init__(
        self,
        shapes: Mapping[str, Stored],
        read: Reader,
        metadata: Mapping[str, str] | None = None,
        *,
        what: str,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            shapes: of the tensors in the file, by their names there. Only marks and plain scales are read.
            read: reads one of them.
            metadata: of a safetensors file.
            what: names the file in errors ("The VAE file a.safetensors").
            names: what a tensor is called here -> in the file, for those that belong to the model; None for all.

        Raises CheckpointError, one sentence, for a format that is not read and for parts that do not fit their weight.
        """
        self.what = what
        self._read = read
        self._shapes = shapes
        names = {name: name for name in shapes} if names is None else names
        parts = _Parts(shapes, read, metadata or {}, names, what)
        self.stored = {name: parts.weight(stored) for name, stored in names.items() if stored not in parts.parts}
        parts.check()

    @classmethod
    def of(
        cls, source: CheckpointFile | Mapping[str, Tensor], anchors: Sequence[str], *, kind: str, what: str
    ) -> Weights:
        """The model in a file, or in tensors, that the first of `anchors` which is there belongs to (`bare_names`).

        Raises CheckpointError without any of them: it is no `kind` ("a Wan2.1 VAE"); and as the class does.
        """
        if isinstance(source, CheckpointFile):
            shapes: Mapping[str, Stored] = source.shapes
            read, metadata = source.read, source.metadata
        else:
            shapes, read, metadata = source, _reader_of(source), {}
        names = next(filter(None, (bare_names(shapes, anchor) for anchor in anchors)), None)
        if names is None:
            raise CheckpointError(f"{what} is {kind_of(shapes)}, not {kind}.")
        return cls(shapes, read, metadata, what=what, names=names)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def blank(self) -> dict[str, Tensor]:
        """The same tensors on the meta device: shapes of the values; float32 where they are quantized."""
        return {
            name: torch.empty(
                stored.shape, dtype=torch.float32 if stored.format is not None else stored.dtype, device="meta"
            )
            for name, stored in self.stored.items()
        }

    def read(self, name: str, device: str | torch.device | None = None) -> Tensor:
        """The tensor as it is stored, or in float32 where it is quantized. On `device`, or where the source has it."""
        stored = self.stored[name]
        place: dict[str, Any] = {} if device is None else {"device": device}
        if stored.format == "gguf":
            return self._read(stored.name, dtype=torch.float32, **place)
        weight = self._read(stored.name, **place)
        if stored.scale is None:
            return weight.float() if stored.format is not None else weight
        scale = self._read(stored.scale, **place)
        if stored.format == "nvfp4":
            return dequantize_nvfp4(*self.nvfp4(name, device), torch.float32)
        if stored.format == "mxfp8":
            rows, blocks = weight.shape[0], weight.shape[1] // MXFP8_BLOCK
            scale = scale.view(torch.uint8)
            plain = scale.shape == (rows, blocks) and not _is_tiled(scale, rows, blocks)
            powers = (scale if plain else untiled(scale, rows, blocks)).view(torch.float8_e8m0fnu).float()
            grouped: Tensor = weight.float().unflatten(1, (blocks, MXFP8_BLOCK))
            return (grouped * powers.unsqueeze(-1)).flatten(1)
        return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))

    def as_stored(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """The stored tensor itself, in memory of its own."""
        return self._read(self.stored[name].name, device=device)

    def scale(self, name: str, device: str | torch.device = "cpu") -> Tensor | None:
        """The float scale of a weight, float32: one value, or one per output row; None without one."""
        scale = self.stored[name].scale
        return None if scale is None else self._read(scale, device=device, dtype=torch.float32)

    def nvfp4(self, name: str, device: str | torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(packed values, block scales e4m3 in cuBLAS's order, second scale float32 []) of an nvfp4 weight."""
        stored = self.stored[name]
        assert stored.scale is not None
        assert stored.scale_2 is not None
        place: dict[str, Any] = {} if device is None else {"device": device}
        packed = self._read(stored.name, **place)
        blocks = self._read(stored.scale, **place).view(torch.float8_e4m3fn)  # some savers write the bytes
        shape = nvfp4_storage_shapes(*stored.shape)[1]
        return packed, blocks.reshape(shape), self._read(stored.scale_2, **place).float().reshape(())


def _reader_of(state: Mapping[str, Tensor]) -> Reader:
    def read(name: str, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return state[name].to(device=device, dtype=dtype)

    return read


class _Parts:
    """Which tensors of a file belong to which weight; `names` as `Weights` takes them."""

    def __init__(
        self,
        shapes: Mapping[str, Stored],
        read: Reader,
        metadata: Mapping[str, str],
        names: Mapping[str, str],
        what: str,
    ) -> None:
        self.shapes, self.read, self.what = shapes, read, what
        self.bare = {stored: name for name, stored in names.items()}
        self.parts: set[str] = set()  # names of scales, marks and markers
        self._of: dict[str, dict[str, str]] = {}  # layer -> part -> name
        self._marked = _MARKER in shapes  # the marker may lie outside of the prefix
        for name in self.bare:
            layer, last = _split(name)
            if last == _MARKER:
                self.parts.add(name)
                self._marked = True
            elif last in _PARTS:
                self.parts.add(name)
                self._of.setdefault(layer, {})[last] = name
        self._header = _header_formats(metadata, what)
        self._weights: list[StoredWeight] = []
        self._stated: set[str] = set()  # weights whose format a mark or the header states

    def weight(self, name: str) -> StoredWeight:
        """The tensor `name` with its parts. Raises CheckpointError where they do not fit it."""
        layer, last = _split(name)
        stored = self.shapes[name]
        parts = self._of.get(layer, {}) if last == "weight" else {}
        scales = [parts[part] for part in _SCALES if part in parts]
        if len(scales) > 1:
            raise self._error(f"has two scales for {name}, {scales[0]} and {scales[1]}")
        form, full_precision = self._format(layer, name, parts)
        if form is None and stored.dtype == torch.float8_e8m0fnu:  # which torch counts among the floats
            raise self._error(f"stores {name} as float8_e8m0fnu, in which only scales are stored")
        scale = scales[0] if scales else None
        weight = StoredWeight(name, stored, form, scale, parts.get("weight_scale_2"), full_precision)
        self._check_scales(weight)
        self._weights.append(weight)
        return weight

    def check(self) -> None:
        """Raise CheckpointError for what is left: parts without a weight, weights without a scale, unknown parts."""
        layers = {layer for layer, last in map(_split, self.bare) if last == "weight"}
        for layer, parts in self._of.items():
            if layer not in layers:
                raise self._error(f"has {next(iter(parts.values()))}, but no {_joined(layer, 'weight')}")
        for name in self.bare:
            if name not in self.parts:
                self._check_known(name, layers)
        self._check_all_scaled()

    # ------------------------------------------------------------------------------------------------ the format

    def _format(self, layer: str, name: str, parts: Mapping[str, str]) -> tuple[str | None, bool]:
        """(one of FORMATS, "gguf" or None, full precision): by the tensor's mark, the header or its dtype."""
        # The header names layers as the file does, or without the prefix.
        called = dict.fromkeys((layer, _split(self.bare[name])[0])) if _split(name)[1] == "weight" else ()
        marks = [self._header[layer] for layer in called if layer in self._header]
        if "comfy_quant" in parts:
            marks.append(self._mark(parts["comfy_quant"], name))
        stored = self.shapes[name]
        if not marks:
            return _plain_format(stored), False
        form, full_precision = marks[0]
        other = next((other for other, _ in marks if other != form), None)
        if other is not None:
            raise self._error(f"states two formats for {name}, {form} and {other}")
        self._stated.add(name)
        if form not in FORMATS:
            raise self._error(f"stores {name} as '{form[:40]}', which is not supported ({', '.join(FORMATS)} are)")
        if isinstance(stored, GGUFTensor) or stored.dtype != FORMATS[form]:
            kind = stored.quant_type if isinstance(stored, GGUFTensor) else _plain(stored.dtype)
            raise self._error(f"states the format {form} for {name}, but stores it as {kind}")
        return form, full_precision

    def _mark(self, name: str, weight: str) -> tuple[str, bool]:
        content = self.shapes[name]
        try:
            if content.dtype not in (torch.uint8, torch.int8) or content.nbytes > _LONGEST_MARK:
                raise ValueError("it is no text")
            mark = json.loads(bytes(self.read(name).view(torch.uint8).flatten().tolist()))
        except (ValueError, RecursionError) as error:
            raise self._unreadable(name, weight) from error
        return _format_of(mark, weight, self.what, self._unreadable(name, weight))

    # ------------------------------------------------------------------------------------------------ the scales

    def _check_scales(self, weight: StoredWeight) -> None:
        """Raise CheckpointError unless the scales are those that the format of the weight has."""
        name, form, scale = weight.name, weight.format, weight.scale
        if form != "nvfp4" and weight.scale_2 is not None:
            raise self._error(f"has {weight.scale_2} beside {name}, which it does not state to be nvfp4")
        if scale is None:
            if name in self._stated:
                raise self._error(f"states the format {form} for {name}, but has no scale for it")
            return
        if form is None or form == "gguf":
            kind = weight.stored.quant_type if isinstance(weight.stored, GGUFTensor) else _plain(weight.dtype)
            raise self._error(f"has {scale} beside {name}, which is stored as {kind} and takes no scale")
        shape = self.shapes[scale].shape
        rows = weight.shape[0] if weight.shape else 1
        if form == "nvfp4":
            self._check_nvfp4(weight, scale)
        elif form == "mxfp8":
            fits = len(weight.shape) == 2 and weight.shape[1] % MXFP8_BLOCK == 0
            blocks = weight.shape[1] // MXFP8_BLOCK if fits else 0
            if not fits or not (shape == (rows, blocks) or _is_tiled(self.shapes[scale], rows, blocks)):
                raise self._misfit(weight, scale, "mxfp8 has one scale per 32 values of a row")
            if self.shapes[scale].dtype not in (torch.uint8, torch.float8_e8m0fnu):
                raise self._wrong_dtype(scale, "float8_e8m0fnu")
        else:
            per_row = len(shape) > 0 and shape[0] == rows and math.prod(shape) == rows
            if math.prod(shape) != 1 and not per_row:
                raise self._misfit(weight, scale, "a scale is one value or one per output row")
            self._check_values(scale)

    def _check_nvfp4(self, weight: StoredWeight, scale: str) -> None:
        second = weight.scale_2
        if second is None:
            raise self._error(f"stores {weight.name} as nvfp4, but has no weight_scale_2 for it")
        if len(weight.stored.shape) != 2:
            raise self._misfit(weight, scale, "nvfp4 weights are matrices")
        blocks = nvfp4_storage_shapes(*weight.shape)
        if tuple(weight.stored.shape) != blocks[0] or math.prod(self.shapes[scale].shape) != math.prod(blocks[1]):
            raise self._misfit(weight, scale, "nvfp4 has one scale per 16 values of a row, in tiles of 128 x 4")
        if self.shapes[scale].dtype not in (torch.uint8, torch.float8_e4m3fn):
            raise self._wrong_dtype(scale, "float8_e4m3fn")
        if math.prod(self.shapes[second].shape) != 1:
            raise self._misfit(weight, second, "nvfp4's second scale is one value")
        self._check_values(second)

    def _check_values(self, scale: str) -> None:
        if self.shapes[scale].dtype not in _SCALE_DTYPES:
            raise self._wrong_dtype(scale, "float32")
        if not bool(torch.isfinite(self.read(scale)).all()):
            raise self._error(f"has a {scale} that is not finite", "download it again")

    def _check_all_scaled(self) -> None:
        """Raise CheckpointError for a float8 weight without a scale in a file that scales others.

        Writers of such files give a scale to each matrix (and kernel) that they store as float8, and leave the rest in
        16 or 32 bits. What they scale none of, norms and biases say, may be plain float8.
        """
        float8 = [weight for weight in self._weights if weight.format in ("float8_e4m3fn", "float8_e5m2")]
        scaled = {len(weight.shape): weight.name for weight in float8 if weight.scale}
        if self._marked and float8 and not scaled:
            raise self._error(f"has the marker {_MARKER}, but no scale beside any weight")
        for weight in float8:
            if weight.scale is None and len(weight.shape) in scaled:
                raise self._error(
                    f"has no scale for {weight.name}, which is float8 as {scaled[len(weight.shape)]}, which has one"
                )

    # --------------------------------------------------------------------------------------------------- the rest

    def _check_known(self, name: str, layers: set[str]) -> None:
        """Raise CheckpointError for a tensor whose name says that it is part of a quantized weight."""
        last = _split(name)[1]
        if last in _HARMLESS:
            return
        outer = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        beside = next((stem for stem in outer if stem in layers and name[len(stem) + 1 :] not in _BESIDE), None)
        if beside is not None:
            raise self._error(f"has {name} beside {beside}.weight, which is a quantization that is not supported")
        if _LEFTOVER.fullmatch(last):
            raise self._error(f"has {name}, part of a quantization that is not supported")

    def _error(self, fault: str, advice: str = _ANOTHER) -> CheckpointError:
        return CheckpointError(f"{self.what} {fault}; {advice}.")

    def _misfit(self, weight: StoredWeight, scale: str, rule: str) -> CheckpointError:
        return self._error(
            f"has {scale} of shape {list(self.shapes[scale].shape)} for a weight of shape {list(weight.stored.shape)} "
            f"({rule})",
        )

    def _wrong_dtype(self, scale: str, wanted: str) -> CheckpointError:
        return self._error(f"stores {scale} as {_plain(self.shapes[scale].dtype)} where {wanted} belongs")

    def _unreadable(self, name: str, weight: str) -> CheckpointError:
        return CheckpointError(
            f"{self.what} has an unreadable {name}, which states how {weight} is quantized; download it again."
        )


def _header_formats(metadata: Mapping[str, str], what: str) -> dict[str, tuple[str, bool]]:
    """Layer -> (format, full precision), as the header states it. Raises CheckpointError where it cannot be read."""
    if HEADER not in metadata:
        return {}
    fault = CheckpointError(
        f"{what} has an unreadable {HEADER} in its header, which states how its weights are quantized; "
        "download it again."
    )
    try:
        content = json.loads(metadata[HEADER])
    except (ValueError, TypeError, RecursionError) as error:
        raise fault from error
    layers = content.get("layers", {}) if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise fault
    version = str(content.get("format_version", "1.0"))
    if version.split(".")[0] != "1":
        raise CheckpointError(
            f"{what} states its quantization in version {version} of {HEADER}, of which version 1.0 is read; "
            f"{_ANOTHER}."
        )
    return {layer: _format_of(mark, f"{layer}.weight", what, fault) for layer, mark in layers.items()}


def _format_of(mark: Any, weight: str, what: str, fault: CheckpointError) -> tuple[str, bool]:
    """(format, full precision) of a mark; `fault` where it states no format, an error where it asks for more."""
    if not isinstance(mark, dict) or not isinstance(mark.get("format"), str):
        raise fault
    for key, value in mark.items():
        usual = key in _MARK_FIELDS or (key == "group_size" and value == _BLOCKS.get(mark["format"]))
        if value and not usual:
            raise CheckpointError(
                f"{what} stores {weight} as '{mark['format'][:40]}' with {key[:40]} {str(value)[:40]}, which is not "
                f"supported; {_ANOTHER}."
            )
    return str(mark["format"]), bool(mark.get("full_precision_matrix_mult"))


def _plain_format(stored: Stored) -> str | None:
    """The format that the dtype alone says."""
    if isinstance(stored, GGUFTensor):
        return "gguf"
    return {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}.get(stored.dtype)


def _is_tiled(scale: Stored, rows: int, blocks: int) -> bool:
    """Whether block scales have the size of cuBLAS's order, which pads rows and columns to whole tiles."""
    return math.prod(scale.shape) == math.prod(tile_padded(rows, blocks))


def _split(name: str) -> tuple[str, str]:
    layer, _, last = name.rpartition(".")
    return layer, last


def _joined(layer: str, last: str) -> str:
    return f"{layer}.{last}" if layer else last


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
