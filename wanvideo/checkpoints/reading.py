"""What is asked of a file before it is read, and what reading may raise, turned into sentences about that file.

Files of users are anything: cut short, renamed, written by other programs, made to mislead. Every place that reads one
does so inside `reading` (its bytes) or `fitting` (what follows from its tensors), so that no library's exception
leaves them.
"""

from __future__ import annotations

import json
import pickle
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, InfiniteTalkError

__all__ = ["Format", "check_regular", "fitting", "format_of", "json_object", "reading", "small_file"]

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # RecursionError too
    SafetensorError,
    TypeError,
    ValueError,  # UnicodeError and JSON's too
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
)
"""What libraries raise about the content of a file."""

MAX_SMALL = 2**28
"""Bytes of a configuration, an index or a vocabulary."""

Format = Literal["safetensors", "zip", "pickle", "gguf", "json", "unknown"]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what a library raises about the bytes of `path` into one CheckpointError; our own errors pass."""
    with _faults(
        lambda reason: (
            f"{path} is damaged or was not downloaded completely ({reason}); download it again and compare its size."
        )
    ):
        try:
            yield
        except OSError as error:
            if error.strerror is None:  # a library's, about the content
                raise
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turn what is raised while sizes are computed from the tensors of `what` into one CheckpointError."""
    with _faults(lambda reason: f"{what} is damaged or another model: its tensors do not fit together ({reason})."):
        yield


@contextmanager
def _faults(sentence: Any) -> Iterator[None]:
    try:
        yield
    except (InfiniteTalkError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        if "can't allocate memory" in str(error):  # torch's word for the host's memory: not the file's fault
            raise
        raise CheckpointError(sentence(_first_clause(error))) from error


def _first_clause(error: BaseException) -> str:
    """The first sentence of an exception's text, at most 160 characters, or its type."""
    lines = str(error).strip().splitlines()
    text = lines[0].split(". ")[0].rstrip(".") if lines else ""
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 160 else f"{text[:157]}..."


def check_regular(path: Path) -> None:
    """Raise CheckpointError unless `path` is a regular file, which opening cannot block on."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        problem = "does not exist; check the path" if missing else f"cannot be read: {_first_clause(error)}"
        raise CheckpointError(f"{path} {problem}.") from error
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a folder; name the file inside it.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is a pipe, socket or device, not a file; copy it to a file first.")


def small_file(path: Path) -> bytes:
    """The content of a regular file of at most MAX_SMALL bytes; CheckpointError for others."""
    check_regular(path)
    with reading(path):
        if path.stat().st_size > MAX_SMALL:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, far more than a file of its kind.")
        return path.read_bytes()


def format_of(head: bytes) -> Format:
    """What a file is by its first 64 bytes or fewer, whatever its name says."""
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40:  # after the header's length, its JSON
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head.lstrip()[:1] == b"{":
        return "json"
    return "unknown"


def json_object(source: Path | str | bytes | None, what: str = "") -> dict[str, Any]:
    """The JSON object in a file (a Path), or in a text that `what` names; {} for None and for a file that is not there.

    Raises CheckpointError for a text that is no JSON, and for JSON that is no object.
    """
    if source is None or (isinstance(source, Path) and not source.exists()):
        return {}
    what = what or str(source)
    if isinstance(source, Path):
        source = small_file(source)
    try:
        content = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no valid JSON ({_first_clause(error)}); download the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} holds a {type(content).__name__} instead of a JSON object; download it again.")
    return content
