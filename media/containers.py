"""Opening media files with FFmpeg, as files: no name is an address, and no file leads to another one."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.error
from packaging.version import Version

from ..wanvideo.errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["check_file", "decoded", "file_address", "open_media", "reason"]

# Demuxers of single files that know time. Left out: playlists and others that open further files or addresses (hls,
# concat, dash, imf, sdp, image2 ...), devices, generators, and streams without a header, which fit anything.
FORMATS = (
    "aac,ac3,aiff,amr,ape,apng,asf,au,avi,caf,dts,dtshd,dv,eac3,flac,flv,gif,gsm,gxf,ircam,ivf,live_flv,loas,"
    "matroska,webm,mlp,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nut,ogg,oma,pvf,qcp,rm,sox,tak,"
    "truehd,tta,voc,w64,wav,wtv,wv,xwma,yuv4mpegpipe"
)

# A title in another encoding does not keep a file from being read. From 19 on PyAV reads any, and has no such option.
ANY_METADATA: dict[str, Any] = {} if Version(av.__version__) >= Version("19") else {"metadata_errors": "replace"}


def check_file(path: Path, what: str) -> None:
    """Raises InputError unless `path` is a regular file that holds something; `what`: "recording" or "video"."""
    try:
        found = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read ...
        raise InputError(f"The {what} {path} cannot be read ({error.strerror}): check the path.") from error
    if not found:
        raise InputError(f"The {what} {path} does not exist: check the path.")
    if path.is_dir():
        raise InputError(f"The {what} {path} is a folder; give the file itself.")
    if not path.is_file():  # reading it might never end
        raise InputError(f"The {what} {path} is a pipe or a device; give a file.")
    if path.stat().st_size == 0:
        raise InputError(f"The {what} {path} is an empty file.")


def file_address(path: Path) -> str:
    """The name of a file for FFmpeg, which would take names such as "concat:a" for addresses."""
    return f"file:{path.absolute()}"


def open_media(path: Path) -> Any:
    """The container of a media file, to read. Raises OSError and FFmpegError."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    return av.open(file_address(path), options=options, **ANY_METADATA)


def decoded(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """The frames of a stream; what is damaged is left out, as players do, with a warning.

    Raises FFmpegError where nothing can be decoded.
    """
    damaged, error, any_frame = 0, None, False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as found:
            damaged, error = damaged + 1, found
            continue
        any_frame = any_frame or bool(frames)
        yield from frames
    if error is not None and not any_frame:
        raise error
    if damaged:
        logger.warning("%s is damaged: %d of its pieces could not be decoded and are left out.", path, damaged)


def reason(error: Exception) -> str:
    """Why FFmpeg could not read a file."""
    if getattr(error, "errno", None) == errno.EINVAL:
        return "its format is none of those that are read"
    return str(getattr(error, "strerror", None) or error)
