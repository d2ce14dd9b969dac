"""Going on with a video after its run has ended too early: what is kept after each window, and whether it still fits.

Next to NAME.partial.mp4 stands NAME.partial.safetensors, replaced in one step after each window, before the window is
announced. It holds what the next window needs (`RunState`), how far the partial file has come, and two descriptions:
*what* is made (settings, and hashes of all inputs), which must be the same to go on, and *how* (device, memory), which
may differ; the bits may then differ too, and the log says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..media.video import OutputFiles, Written, replace_file
from ..wanvideo.checkpoints.reading import FAULTS
from ..wanvideo.errors import InputError
from .long_video import RunState
from .plan import GenerateConfig

__all__ = [
    "Entry",
    "Journal",
    "describe",
    "describe_config",
    "digest_of_file",
    "digest_of_weights",
    "finished_windows",
    "written_of",
]

logger = logging.getLogger(__name__)

WHOLE = 64 * 2**20
"""Files up to this many bytes are hashed whole; of larger ones the first MiB, the size and the time of change."""

KEY = "infinitetalk"
DIGEST = "sha256:"


@dataclass(frozen=True)
class Entry:
    """What is kept after a window.

    Attributes:
        state: what the next window needs.
        written: how far the partial file has come.
        what, how: names -> values, or their digests; `kernels`: attention kernels that have run.
    """

    state: RunState
    written: Written
    what: Mapping[str, str]
    how: Mapping[str, str]
    kernels: Collection[str] = ()


class Journal:
    """The journal of one video.

    Args:
        what: name -> value of everything that must be the same when a run goes on.
        how: likewise of what may differ.
    """

    def __init__(self, files: OutputFiles, what: Mapping[str, str], how: Mapping[str, str]) -> None:
        self.files, self.what, self.how = files, what, how
        self._kernels_before: set[str] | None = None

    def start(self, resume: bool) -> Entry | None:
        """Where to go on; None: with the first window.

        Raises InputError where `resume` is asked for and the finished windows are not those of this job.
        """
        if not resume:
            if self.files.journal.exists():
                logger.warning(
                    "What an earlier run has finished is in %s, and is replaced by the first window of this one; "
                    "stop now and resume to go on with it.",
                    self.files.partial,
                )
            return None
        entry = _read(self.files)
        if entry is None:
            logger.info("There is nothing to go on with: starting with the first window.")
            return None
        differing = self.differences(entry)
        if differing:
            raise InputError(
                f"The finished windows in {self.files.partial} were made with other settings: {'; '.join(differing)}. "
                "Give those that they were made with, or begin anew by not resuming."
            )
        for name in _differing(entry.how, self.how):
            logger.warning(
                "%s is %s, and was %s for the windows before: bits may differ from those of an uninterrupted run.",
                name.capitalize(),
                self.how.get(name, "none"),
                entry.how.get(name, "none"),
            )
        logger.info("Going on after window %d, at frame %d.", entry.state.windows, entry.written.frames)
        self._kernels_before = set(entry.kernels)
        return entry

    def differences(self, entry: Entry) -> list[str]:
        """What is not as it was for the windows before, such as "seed 43, was 42"."""
        found = []
        for name in _differing(entry.what, self.what):
            now, before = self.what.get(name, "none"), entry.what.get(name, "none")
            short = len(now) + len(before) < 60 and not (now + before).count(DIGEST)
            found.append(f"{name} {now}, was {before}" if short else f"another {name}")
        return found

    def save(self, state: RunState, written: Written, kernels: Collection[str]) -> None:
        """Replace the entry; on return it is on the disk. Raises OSError."""
        if self._kernels_before is not None:
            new = set(kernels) - self._kernels_before
            if new:
                logger.warning(
                    "Attention is computed by %s, which the windows before did not use: bits may differ from those of "
                    "an uninterrupted run.",
                    ", ".join(sorted(new)),
                )
            kernels = set(kernels) | self._kernels_before
            self._kernels_before = None if new else self._kernels_before
        tensors = {"generator": state.generator, "carried": state.carried, "latents": state.latents}
        about = {
            "windows": state.windows,
            "floor": state.floor,
            "written": vars(written),
            "what": dict(self.what),
            "how": dict(self.how),
            "kernels": sorted(kernels),
        }
        about["digest"] = _digest_of_entry(about, tensors)
        data = safetensors.torch.save(  # which takes no strided tensors
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {KEY: json.dumps(about)}
        )
        replace_file(self.files.journal, self.files.temporary, data)


def finished_windows(files: OutputFiles) -> int:
    """Windows that a later run need not make again."""
    try:
        entry = _read(files)
    except InputError:
        return 0
    return 0 if entry is None else entry.state.windows


def written_of(journal: bytes) -> Written:
    """How far the partial file has come, by the bytes of a journal that is whole."""
    header = json.loads(journal[8 : 8 + int.from_bytes(journal[:8], "little")])
    return Written(**json.loads(header["__metadata__"][KEY])["written"])


def _read(files: OutputFiles) -> Entry | None:
    if not files.journal.exists():
        return None
    try:
        if not files.journal.is_file():  # opening a pipe would wait
            raise ValueError("it is no file")
        with safetensors.safe_open(files.journal, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in ("generator", "carried", "latents")}
        if about.pop("digest") != _digest_of_entry(about, tensors):
            raise ValueError("it is not as it was written")
        state = RunState(about["windows"], tensors["generator"], tensors["carried"], about["floor"], tensors["latents"])
        entry = Entry(state, Written(**about["written"]), about["what"], about["how"], about["kernels"])
    except FAULTS as error:
        raise InputError(f"{files.journal} is damaged ({error}): begin anew by not resuming.") from error
    size = files.partial.stat().st_size if files.partial.is_file() else 0
    if size < entry.written.bytes:
        raise InputError(
            f"{files.partial} is missing or has been cut ({size} of {entry.written.bytes} bytes): put it back, or "
            "begin anew by not resuming."
        )
    return entry


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in dict.fromkeys((*now, *before)) if before.get(name) != now.get(name)]


# --- descriptions ----------------------------------------------------------------------------------------------------


def describe_config(config: GenerateConfig) -> dict[str, str]:
    """Names and values of the settings that decide what is made."""
    parts: dict[str, str] = {}
    for name, value in vars(config).items():
        if name not in ("device", "tiled_vae", "total_frames", "attention_policy"):
            parts |= describe(name.replace("_", " "), value)
    return parts


def describe(name: str, value: object, *, files: bool = False) -> dict[str, str]:
    """Names and values, or digests, of all that a value is made of.

    Dataclasses give a name for each field, which stands alone outside of sequences; several items of a sequence are
    numbered.

    Args:
        files: whether strings are paths of files, as a `Path` always is.
    """
    if is_dataclass(value) and not isinstance(value, type):
        parts: dict[str, str] = {}
        for entry in fields(value):
            parts |= describe(entry.name.replace("_", " "), getattr(value, entry.name), files=files)
        return parts
    if isinstance(value, Path) or (files and isinstance(value, str)):
        return {name: digest_of_file(Path(value).expanduser())}
    if isinstance(value, torch.Tensor):
        return {name: _digest_of_tensor(value)}
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        named: dict[str, str] = {}
        for number, item in enumerate(value, 1):
            label = name if len(value) == 1 else f"{name} {number}"
            parts = describe(label, item, files=files)
            named |= {f"{label} {key}": part for key, part in parts.items()} if is_dataclass(item) else parts
        return named
    return {name: str(value)}


def digest_of_file(path: Path) -> str:
    """A digest of a file, or of the files in a folder; where there is none, its name."""
    if not path.exists():
        return str(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(part for part in path.iterdir() if part.is_file()):
            digest.update(f"{part.name} {digest_of_file(part)}\n".encode())
        return DIGEST + digest.hexdigest()
    state = path.stat()
    whole = state.st_size <= WHOLE
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
            if not whole:
                digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
                break
    return DIGEST + digest.hexdigest()


def _digest_of_entry(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of all that a journal holds: whatever else is in it is damage."""
    parts = [json.dumps(about, sort_keys=True), *map(_digest_of_tensor, tensors.values())]
    return DIGEST + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest_of_tensor(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for part in tensor if tensor.ndim else tensor[None]:
        digest.update(_bytes(part))
    return DIGEST + digest.hexdigest()


def digest_of_weights(module: torch.nn.Module) -> str:
    """A digest of the names, types, shapes and first values of a model's weights, wherever they are."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {getattr(value, 'dtype', None)} {list(getattr(value, 'shape', ()))}\n".encode())
        if isinstance(value, torch.Tensor):
            digest.update(_bytes(value.detach().flatten()[:32]))
    return DIGEST + digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    # A dtype of another size is viewed only where elements lie side by side.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
