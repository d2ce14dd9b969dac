"""A folder of frames: one PNG for each, numbered from 0."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import torch
from PIL import Image

from ..wanvideo.errors import InfiniteTalkError, InputError
from .containers import reason

__all__ = ["FrameFolder"]

_FRAME = re.compile(r"frame_\d{6,}\.png")


class FrameFolder:
    """Writes frames into NAME.partial, beside NAME, and moves them to NAME when its context is left without an error.

    Frames of an earlier video in NAME are removed then; other files stay. After an error NAME.partial stays, and the
    next run begins it anew.

    Args:
        folder: NAME, made when missing.

    Raises InputError, at once, where no folder can be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")
        self.count = 0
        try:
            for place in (self.folder, self.partial):
                place.mkdir(parents=True, exist_ok=True)
            for frame in _frames(self.partial):
                frame.unlink()
        except OSError as error:
            raise InputError(
                f"The frames cannot be written to {folder}: {reason(error)}. Name another folder, or a video file that "
                "ends in .mp4."
            ) from error

    def append(self, frames: torch.Tensor) -> None:
        """Write frames [n, H, W, 3], uint8. Raises InfiniteTalkError when the disk does not take them."""
        try:
            for pixels in frames.cpu().numpy():
                Image.fromarray(pixels).save(self.partial / f"frame_{self.count:06}.png", compress_level=1)
                self.count += 1
        except OSError as error:
            raise InfiniteTalkError(f"The frames cannot be written to {self.partial}: {reason(error)}.") from error

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        try:
            for frame in _frames(self.folder):
                frame.unlink()
            for frame in _frames(self.partial):
                frame.replace(self.folder / frame.name)
            self.partial.rmdir()
        except OSError as failure:
            raise InfiniteTalkError(
                f"The frames stay in {self.partial}, they cannot be moved to {self.folder}: {reason(failure)}."
            ) from failure


def _frames(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _FRAME.fullmatch(path.name))
