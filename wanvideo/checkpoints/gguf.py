"""GGUF files: named tensors with a type each, after a header of named entries.

F32, F16 and BF16 are plain; the others store blocks of 32 or 256 values with their scales. Linear layers keep the
blocks (`linear.gguf.GGUFLinear`); everything else is unpacked when it is loaded.

The header is read here and not by the gguf package, which believes each length that it states (a list of 2**40 values
fills the memory) and makes an object of every value (a vocabulary takes ten seconds). The layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..linear.gguf import GGUFTensor, unpacking_of
from .reading import check_regular, reading

__all__ = ["GGUFContent", "open_gguf", "read_gguf", "read_gguf_metadata"]

Stored = Tensor | GGUFTensor

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

ORIG_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its true shape, where it was flattened (GGUF knows four dimensions at most)."""

_STRING, _ARRAY = 8, 9
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value in the header -> its form in `struct`."""

MAX_RANK = 8

MAX_BYTES = 2**24
"""Of one text or list in the header: eight times what the largest vocabulary takes."""

_UNKNOWN_PIECE, _BYTE_PIECE = 2, 6
"""Types of SentencePiece's pieces, which GGUF's `token_type` repeats."""


@dataclass(frozen=True)
class GGUFContent:
    """What a GGUF file holds.

    Attributes:
        tensors: under their names, in true shapes, mapped: the bytes are read when they are copied. F32, F16 and BF16
            tensors come as they are, the others as GGUFTensor. The vocabulary of a text encoder is `spiece_model`.
        entries: of the header: name -> text, number, or list of them.
    """

    tensors: dict[str, Stored]
    entries: dict[str, Any]

    @property
    def metadata(self) -> dict[str, str]:
        """The entries that are texts, "general.architecture" for instance."""
        return {name: value for name, value in self.entries.items() if isinstance(value, str)}


def read_gguf(path: str | Path) -> dict[str, Stored]:
    """The tensors of `open_gguf`."""
    return open_gguf(path).tensors


def read_gguf_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header; raises as `open_gguf`."""
    return open_gguf(path).metadata


def open_gguf(path: str | Path) -> GGUFContent:
    """What the file holds. Raises CheckpointError where it is missing, damaged or truncated, or of another version, or
    holds a type of tensors that is not supported.
    """
    path = Path(path)
    check_regular(path)
    with reading(path):
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty: it is damaged or was not downloaded completely.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _Header(content, path)
            header.read()
        # Copy on write: torch asks for memory that could be written to.
        data = np.memmap(path, mode="c")[header.position :]
        tensors = {info.name: _tensor(info, data, header.entries, path) for info in header.infos}
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors; download it again.")
        if len(tensors) != len(header.infos):
            raise ValueError("two tensors have one name")
        vocabulary = _sentencepiece_model(header.entries)
        if vocabulary is not None:
            tensors["spiece_model"] = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
        return GGUFContent(tensors, header.entries)


# --------------------------------------------------------------------------------------------------------- the header


@dataclass(frozen=True)
class _Info:
    """A tensor as the header states it: innermost dimension first, `offset` behind the header."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


class _Header:
    """Walks over a header, and holds each length that it states against the file's size before anything is made.

    Attributes:
        entries, infos: what it holds.
        position: where the tensors begin.
    """

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path, self.size = content, path, len(content)
        self.position = 0
        self.entries: dict[str, Any] = {}
        self.infos: list[_Info] = []

    def read(self) -> None:
        """Raises CheckpointError for a version that is not read, ValueError where a length is beyond the file."""
        if self.content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.position = 4
        version = self._number("I")
        if version not in (2, 3):
            other = "for a machine of the other byte order" if version & 0xFFFF == 0 else f"in GGUF version {version}"
            raise CheckpointError(f"{self.path} was written {other}, which is not read; use another file of the model.")
        tensors, entries = self._number("Q"), self._number("Q")
        self._check_room(entries, 13, "entries")
        self._check_room(tensors, 24, "tensors")
        for _ in range(entries):
            name = self._text()
            self.entries[name] = self._value(self._number("I"))
        self.infos = [self._tensor_info() for _ in range(tensors)]
        alignment = self.entries.get("general.alignment", 32)
        self.position += -self.position % alignment
        for info in self.infos:
            if info.offset + info.nbytes > self.size - self.position:
                raise ValueError(f"it states {info.nbytes} bytes for {info.name[:80]}, which is more than there are")

    def _check_room(self, count: int, each: int, what: str) -> None:
        if count * each > min(self.size - self.position, MAX_BYTES):
            raise ValueError(f"its header states {count} {what}, which is more than it can hold")

    def _numbers(self, form: str, count: int) -> tuple[Any, ...]:
        self._check_room(count, struct.calcsize(form), "values")
        numbers = struct.unpack_from(f"<{count}{form}", self.content, self.position)
        self.position += count * struct.calcsize(form)
        return numbers

    def _number(self, form: str) -> Any:
        return self._numbers(form, 1)[0]

    def _text(self) -> str:
        length = self._number("Q")
        self._check_room(length, 1, "bytes of text")
        self.position += length
        return self.content[self.position - length : self.position].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_form(kind))
        kind, count = self._numbers("I", 1)[0], self._number("Q")
        if kind != _STRING:
            return list(self._numbers(_form(kind), count))
        self._check_room(count, 8, "texts")
        return [self._text() for _ in range(count)]

    def _tensor_info(self) -> _Info:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, rank = self._text(), self._number("I")
        if rank > MAX_RANK:
            raise ValueError(f"{name[:80]} has {rank} dimensions")
        shape = self._numbers("Q", rank)
        kind = GGMLQuantizationType(self._number("I"))
        block, nbytes = GGML_QUANT_SIZES[kind]
        if math.prod(shape) % block:
            raise ValueError(f"{name[:80]} has {math.prod(shape)} values in blocks of {block}")
        return _Info(name, shape, kind.name, self._number("Q"), math.prod(shape) // block * nbytes)


def _form(kind: int) -> str:
    if kind not in _FORMS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _FORMS[kind]


# ---------------------------------------------------------------------------------------------------- the vocabulary


def _sentencepiece_model(entries: Mapping[str, Any]) -> bytes | None:
    """The SentencePiece model (`spiece.model`) whose parts the header of a T5 holds, None without them.

    A protocol buffer of three messages: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """

    def entry(name: str, otherwise: Any = None) -> Any:
        return entries.get(f"tokenizer.ggml.{name}", otherwise)

    if entry("model") != "t5" or entry("tokens") is None:
        return None
    tokens, scores, types = entry("tokens"), entry("scores"), entry("token_type")
    pieces = [
        _message(1, _message(1, token.encode()) + _tag(2, 5) + struct.pack("<f", score) + _varint(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    ids = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}  # -> number of the field
    absent = {"unknown": types.index(_UNKNOWN_PIECE), "bos": -1, "eos": -1, "padding": -1}
    trainer = _varint(3, 1) + _varint(4, len(tokens)) + _varint(35, int(_BYTE_PIECE in types))
    trainer += b"".join(_varint(number, entry(f"{name}_token_id", absent[name])) for name, number in ids.items())
    normalizer = _message(1, b"precompiled") + _message(2, bytes(entry("precompiled_charsmap", ())))
    normalizer += _varint(3, int(entry("add_space_prefix", True)))
    normalizer += _varint(4, int(entry("remove_extra_whitespaces", True)))
    return b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)


def _digits(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _tag(field: int, wire_type: int) -> bytes:
    return _digits(field << 3 | wire_type)


def _varint(field: int, number: int) -> bytes:
    return _tag(field, 0) + _digits(int(number))


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _digits(len(content)) + content


# -------------------------------------------------------------------------------------------------------- the tensors


def _tensor(info: _Info, data: np.ndarray, entries: Mapping[str, Any], path: Path) -> Stored:
    shape = _true_shape(info, entries, path)
    stored = torch.from_numpy(data[info.offset : info.offset + info.nbytes])
    if info.kind in PLAIN_TYPES:
        return stored.view(PLAIN_TYPES[info.kind]).reshape(shape)
    try:
        _, _, type_size = unpacking_of(info.kind)
    except KeyError as error:
        raise CheckpointError(
            f"{path} stores {info.name} as {info.kind}, which is not supported; use a file of type Q8_0, Q6_K, Q5_K or "
            "Q4_K."
        ) from error
    return GGUFTensor(stored.reshape(-1, type_size), info.kind, shape)


def _true_shape(info: _Info, entries: Mapping[str, Any], path: Path) -> torch.Size:
    """GGUF lists the innermost dimension first; the metadata knows better where a tensor was flattened."""
    shape: Sequence[int] = info.shape[::-1]
    original = entries.get(f"{ORIG_SHAPE}{info.name}")
    if original is not None:
        if math.prod(original) != math.prod(shape) or min(original, default=1) < 0:
            raise CheckpointError(
                f"{path} says that {info.name} has the shape {original}, but stores {math.prod(shape)} values."
            )
        shape = original
    return torch.Size(shape)
