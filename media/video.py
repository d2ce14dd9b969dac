"""Video files: windows of frames appended with their sound as they come, and source videos read frame by frame.

While it grows, NAME.mp4 is a fragmented MP4 of the name NAME.partial.mp4. What has been appended is on the disk, whole:
the encoder of the images is drained at each call, and the fragments come into force by one write. When the writer is
closed, the streams are copied into an ordinary MP4 that takes the place of NAME.mp4 in one step; until then whatever
had that name is as it was, and after an error the partial file stays.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import av.error
import filelock
import numpy as np
import torch

from ..wanvideo.errors import InfiniteTalkError, InputError
from .containers import check_file, decoded, file_address, open_media, reason

__all__ = [
    "OutputFiles",
    "StreamWriter",
    "VideoFrames",
    "VideoWriter",
    "Written",
    "check_output",
    "read_comment",
    "replace_file",
    "to_bytes",
]

logger = logging.getLogger(__name__)

SOUND_RATES = (32000, 44100, 48000)
"""Hz that are kept. Others become 48 kHz: at lower rates one AAC packet lasts longer than a video frame."""

BT709 = 1
"""The code of ITU-R BT.709 in the color fields of a stream (ITU-T H.273)."""

BT601 = 5
COLOR_MATRICES = {1: BT709, 4: 4, 5: BT601, 6: BT601, 7: 7, 9: 9, 10: 9}
"""Code of the color matrix in a stream (ITU-T H.273) -> of the one that swscale has for it."""

HDR = (16, 18)
"""Transfer characteristics PQ and HLG (ITU-T H.273)."""

REORDERED = 3
"""Frames from which on an encoder puts some of them before others."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- the files of an output ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFiles:
    """The video to make, and what stands next to it while it is made; all in the folder of the video itself.

    Attributes:
        video: the file to write, links followed.
        partial: what is finished of it, a fragmented MP4.
        journal: what a later run needs to go on from there.
        lock: held by the run that writes.
        temporary: what takes the place of one of them when it is whole.
    """

    video: Path
    partial: Path
    journal: Path
    lock: Path
    temporary: Path

    @classmethod
    def of(cls, path: str | Path) -> OutputFiles:
        """For a path as a user gives it; a symbolic link stands for the file that it leads to."""
        video = Path(os.path.realpath(path))
        beside = [video.with_name(f"{video.stem}.partial{end}") for end in (".mp4", ".safetensors", ".lock", ".tmp")]
        return cls(video, *beside)

    @contextlib.contextmanager
    def locked(self) -> Iterator[OutputFiles]:
        """Keep other runs from writing this video. Raises InputError while one does."""
        lock = filelock.FileLock(self.lock, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"Another run is writing {self.video} at this moment: wait for its end, or name another video."
            ) from None
        except NotImplementedError:
            logger.warning("The file system of %s has no locks: let no other run write this video.", self.video)
        except OSError as error:
            raise InputError(f"The video cannot be written to {self.video}: {error.strerror or error}.") from error
        try:
            yield self
        finally:
            # Removed while it is held, so that it is nobody else's; where an open file cannot be removed, it stays.
            with contextlib.suppress(OSError):
                self.lock.unlink()
            lock.release()

    def add(self, size: int, data: bytes) -> None:
        """Let the partial file be its first `size` bytes and `data`, boxes of MP4; on return they are on the disk.

        Whatever dies meanwhile, players find all of them or none. Raises OSError.
        """
        if size:
            _add_whole(self.partial, size, data)
        else:
            self.journal.unlink(missing_ok=True)  # of an earlier run, whose frames are replaced now
            replace_file(self.partial, self.temporary, data)

    def put_in_place(self) -> None:
        """Let what is in the temporary file be the video, in one step. Raises OSError."""
        _put_in_place(self.temporary, self.video)
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Remove what stands next to a video that is whole. Raises OSError."""
        for file in (self.temporary, self.journal, self.partial):  # without a journal nothing goes on with the partial
            file.unlink(missing_ok=True)


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Reject a place where no video can be written now, not after an hour.

    Args:
        inputs: files that are read, which none of the files written may be, whatever links and names lead to them.

    Raises InputError.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:$", path.parts[0] if path.parts else ""):
        raise InputError(f"The video {path} would be an address, and only files are written: name a file.")
    try:
        _exists(path)
    except (OSError, ValueError) as error:
        raise InputError(f"The video cannot be written to {path}: {reason(error)}.") from error
    files = OutputFiles.of(path)
    if files.video.is_dir():
        raise InputError(f"{path} is a folder; name the video file to write, such as {path / 'video.mp4'}.")
    if files.video.suffix.lower() != ".mp4":
        raise InputError(f"The video {files.video} would not be an MP4: let its name end in .mp4.")
    if files.video.stem.endswith(".partial"):
        whole = f"{files.video.stem.removesuffix('.partial')}.mp4"
        raise InputError(f"{path} is the name of an unfinished video: name the video itself, {whole}.")
    try:
        files.video.parent.mkdir(parents=True, exist_ok=True)
        for file in (files.video, files.partial, files.journal):
            if _exists(file) and not file.is_file():
                raise InputError(f"{file} exists and is no file that can be replaced: name another video.")
            if _exists(file) and not os.access(file, os.W_OK):
                raise InputError(f"{file} is write-protected: name another video.")
        with tempfile.TemporaryFile(dir=files.video.parent):
            pass
    except OSError as error:
        raise InputError(f"The video cannot be written to {path}: {reason(error)}.") from error
    written = (files.video, files.partial, files.journal, files.lock, files.temporary)
    for given in inputs:
        for file in written:
            if _same(given, file):
                raise InputError(f"The video {path} would overwrite its own input {given}: name another video.")


def _exists(path: Path) -> bool:
    """Whether there is anything of this name. Raises OSError or ValueError for one that cannot be, such as too long."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return os.path.realpath(one) == str(other)


def replace_file(path: Path, temporary: Path, data: bytes) -> None:
    """Let `path` hold `data`, in one step and for good: after a crash it is the old file or the new one."""
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """How far a partial file has come, to go on from there: its frames, bytes and fragments."""

    frames: int = 0
    bytes: int = 0
    fragments: int = 0


class _Fragments:
    """Frames and their sound as fragments of one MP4.

    Args:
        fps: frames a second.
        crf: constant rate factor of x264; 0 is lossless, 18 looks so.
        written: how far an earlier one with the same arguments came, to go on behind it.
    """

    def __init__(self, fps: float, crf: int, written: Written | None = None) -> None:
        if not fps > 0:
            raise InputError(f"{fps} frames a second make no video: InfiniteTalk uses 25.")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.crf = crf
        self.written = written or Written()
        self._size: tuple[int, int] | None = None  # height, width as given
        self._sound: _SoundTrack | None = None

    @property
    def seconds(self) -> float:
        """Length of what has been appended."""
        return float(self.written.frames / self.fps)

    def _check(self, frames: torch.Tensor) -> None:
        """Raise InputError for what are no frames, or of another size than those before."""
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise InputError(f"Frames of shape {tuple(frames.shape)} cannot be written: give [n, height, width, 3].")
        size = (int(frames.shape[1]), int(frames.shape[2]))
        if self._size not in (None, size):
            raise InputError(f"Frames of {size[1]} x {size[0]} do not fit this video: all must be of one size.")
        self._size = size

    def _encode(self, frames: torch.Tensor, rest: Sequence[Any] = ()) -> bytes:
        """A fragmented MP4 of these frames and their sound, their times being those in the whole video.

        Args:
            rest: packets of sound behind them.
        """
        buffer = io.BytesIO()
        options = {
            "movflags": "frag_keyframe+delay_moov+default_base_moof+skip_trailer",
            "fragment_index": str(self.written.fragments + 1),
        }
        if self.written.frames:
            options["movflags"] += "+frag_discont"  # times go on where those of the fragments before ended
        with av.open(buffer, "w", format="mp4", options=options) as container:
            images = self._add_images(container)
            delay = self._delay() if self.written.frames and len(frames) < REORDERED else 0
            heard = None if self._sound is None else container.add_stream_from_template(self._sound.stream, opaque=True)
            for index, frame in enumerate(frames, self.written.frames):
                _mux(container, images, _decoded_earlier(images.encode(self._image(frame, index)), delay))
                # Frame by frame, so that both streams are interleaved as players want them.
                if self._sound is not None:
                    packets = self._sound.encode(Fraction(index + 1) / self.fps)
                    _mux(container, heard, packets, self._sound.priming)
            _mux(container, images, _decoded_earlier(images.encode(None), delay))
            if self._sound is not None:
                _mux(container, heard, rest, self._sound.priming)
        return buffer.getvalue()

    def _delay(self) -> int:
        """Frames by which a frame is decoded before it is shown, where the encoder has enough of them to reorder.

        The header of the first fragment states it for all; of fewer frames the encoder would have none.
        """
        assert self._size is not None
        blank = torch.zeros(*self._size, 3, dtype=torch.uint8)
        with av.open(os.devnull, "w", format="null") as container:
            images = self._add_images(container)
            packets = [p for n in range(REORDERED) for p in images.encode(self._image(blank, n))]
            packets += images.encode(None)
        return int(packets[0].pts - packets[0].dts)

    def _add_images(self, container: Any) -> Any:
        assert self._size is not None
        options = {"crf": str(self.crf), "preset": "medium"}
        stream = container.add_stream(_h264(), rate=self.fps, options=options)
        stream.height, stream.width = (side + side % 2 for side in self._size)  # 4:2:0 halves both
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = max(1, round(self.fps))  # a fragment a second
        stream.codec_context.time_base = 1 / self.fps
        stream.codec_context.colorspace = stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        return stream

    def _image(self, frame: torch.Tensor, index: int) -> Any:
        rgb = to_bytes(frame).cpu().numpy()
        height, width = rgb.shape[:2]
        rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        image = image.reformat(format="yuv420p", dst_colorspace="ITU709")
        image.pts, image.time_base = index, 1 / self.fps
        return image

    def _count(self, frames: torch.Tensor, data: bytes, size: int) -> None:
        """Frames whose fragments are among `data` are written, and with them `size` bytes in all."""
        fragments = sum(kind == b"moof" for kind, _ in _boxes(data))
        self.written = Written(self.written.frames + len(frames), size, self.written.fragments + fragments)


class VideoWriter(_Fragments):
    """Writes an H.264 (yuv420p) MP4 with AAC sound. Leaving its context without an error puts it in place.

    Args:
        path: the file, ending in .mp4. What is there is replaced at the end, in one step; until then, and after an
            error, what was appended plays from `files.partial`. Nothing is made before the first frames come.
        fps: frames a second.
        sound: the recording, float32 in [-1, 1], [samples] or [channels, samples] of one or two channels; or None. It
            begins with the first frame, and is cut where it would outlast the last one by a frame or more.
        rate: samples a second of the recording.
        crf: constant rate factor of x264; 0 is lossless, 18 looks so.
        written: how far an earlier writer with the same arguments came, to go on behind it.
        comment: a text that the file carries in its metadata; none where it is empty.

    Attributes:
        files: what is written where.
        written: how far this one has come; it is on the disk.

    Raises:
        InputError: a path that cannot be written to, or sound of another form.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float = 25,
        sound: np.ndarray | torch.Tensor | None = None,
        rate: int | None = None,
        crf: int = 18,
        written: Written | None = None,
        comment: str = "",
    ) -> None:
        check_output(Path(path))
        super().__init__(fps, crf, written)
        self.files = OutputFiles.of(path)
        self.comment = comment
        self._resumed = self.written.frames > 0
        self._sound = None if sound is None else _SoundTrack(sound, rate)
        if self._sound is not None:
            # The encoder has a memory: it is brought to where it was by the same sound once more.
            for frame in range(self.written.frames):
                self._sound.encode(Fraction(frame + 1) / self.fps)

    def append(self, frames: torch.Tensor) -> Written:
        """Add frames [n, H, W, 3], uint8 or float in [0, 1], all of one size, and the sound that goes with them.

        When it returns they are on the disk. Raises InfiniteTalkError when the file cannot be written; what was
        appended before stays.
        """
        self._check(frames)
        if len(frames) == 0:
            return self.written
        with self.explained():
            data = self._encode(frames)
            if self._resumed:
                self._check_headers(data)
            if self.written.frames:
                data = _without_header(data)
            self.files.add(self.written.bytes, data)
        self._resumed = False
        self._count(frames, data, self.written.bytes + len(data))
        return self.written

    def close(self) -> None:
        """End the video and put it in place; without frames there is none."""
        if self.written.frames == 0:
            return
        with self.explained():
            try:
                self._copy_to(self.files.temporary)
                self.files.put_in_place()
            finally:
                self.files.temporary.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self.written.frames and isinstance(error, InfiniteTalkError):
            if str(self.files.partial) not in str(error):
                error.args = (f"{error} {self.kept}",)
        elif self.written.frames and isinstance(error, Exception):
            logger.warning("%s", self.kept)

    @property
    def kept(self) -> str:
        """What an error leaves, in a sentence."""
        return f"What was finished is in {self.files.partial}, which plays ({self.seconds:.1f} s)."

    def _check_headers(self, data: bytes) -> None:
        """Reject frames of another encoder than that of the partial file, whose header holds for all of them."""
        with (
            av.open(file_address(self.files.partial), format="mp4") as old,
            av.open(io.BytesIO(data), format="mp4") as new,
        ):
            for before, now in zip(old.streams, new.streams, strict=True):
                if before.codec_context.extradata != now.codec_context.extradata:
                    raise InfiniteTalkError(
                        f"{self.files.partial} was written by another version of PyAV, and cannot be gone on with by "
                        f"this one ({av.__version__}): install that version, or begin the video anew."
                    )

    def _copy_to(self, path: Path) -> None:
        """Copy what is finished into an ordinary MP4, its index in front, with the rest of the sound."""
        with (
            av.open(file_address(self.files.partial), format="mp4") as source,
            av.open(file_address(path), "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            streams = {s.index: target.add_stream_from_template(s, opaque=True) for s in source.streams}
            if self.comment:
                target.metadata["comment"] = self.comment
            for packet in source.demux():
                if packet.dts is None:  # the empty packets that end each stream
                    continue
                if packet.stream.type == "audio" and self._sound is not None:
                    packet.pts -= self._sound.priming
                    packet.dts -= self._sound.priming
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
            if self._sound is not None:
                _mux(target, target.streams.audio[0], self._rest_of_the_sound(self._sound))

    def _rest_of_the_sound(self, sound: _SoundTrack) -> list[Any]:
        # A recording that ends within a frame of the video is written whole.
        end = sound.encode(sound.seconds) if sound.seconds < Fraction(self.written.frames + 1) / self.fps else []
        return end + sound.finish()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of the file system and of FFmpeg as one sentence that says where the video stands."""
        try:
            yield
        except InfiniteTalkError:
            raise
        except (OSError, av.error.FFmpegError) as error:
            full = getattr(error, "errno", None) in NO_SPACE
            why = "there is no space left for it" if full else str(error)
            kept = f" {self.kept}" if self.written.frames else ""
            todo = "free some space, or write elsewhere" if full else "check the path and its permissions"
            sentence = f"The video {self.files.video} could not be written: {why}.{kept} {todo.capitalize()}."
            raise InfiniteTalkError(sentence) from error


class StreamWriter(_Fragments):
    """Writes an H.264 (yuv420p) MP4 with AAC sound that is read as it grows: a header, then fragments with each window.

    Nothing that is written is changed later, so that the file may be a pipe. Its sound comes late by what the encoder
    holds back of it (1,024 samples, 21 ms at 48 kHz), and the last of it with `close`.

    Args:
        file: open for bytes, and left open.
        fps, crf: as of `VideoWriter`.
    """

    def __init__(self, file: BinaryIO, fps: float = 25, crf: int = 18) -> None:
        super().__init__(fps, crf)
        self.file = file

    def append(
        self, frames: torch.Tensor, sound: np.ndarray | torch.Tensor | None = None, rate: int | None = None
    ) -> None:
        """Write frames [n, H, W, 3], uint8 or float in [0, 1], all of one size, and the sound that goes with them.

        Args:
            sound: float32 in [-1, 1], [samples] or [channels, samples]; of all windows, or of none.
            rate: samples a second of the sound.

        Raises InfiniteTalkError when nobody reads the file any more, or it takes nothing.
        """
        self._check(frames)
        if len(frames) == 0:
            return
        if self.written.frames and (sound is None) != (self._sound is None):
            raise InputError("Either all windows of a stream have sound, or none: give silence where there is none.")
        if self._sound is not None and sound is not None:
            self._sound.extend(sound, rate)
        elif sound is not None:
            self._sound = _SoundTrack(sound, rate)
        data = self._encode(frames)
        data = _without_header(data) if self.written.frames else data
        self._write(data)
        self._count(frames, data, self.written.bytes + len(data))

    def close(self) -> None:
        """Write the rest of the sound."""
        if self._sound is not None and self._size is not None:
            nothing = torch.zeros(0, *self._size, 3, dtype=torch.uint8)
            data = self._encode(nothing, [*self._sound.encode(self._sound.seconds), *self._sound.finish()])
            self._write(_without_header(data))

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]
            self.file.flush()
        except BrokenPipeError as error:
            raise InfiniteTalkError(
                f"The stream's reader has closed it, after {self.written.frames} frames ({self.seconds:.1f} s)."
            ) from error
        except OSError as error:
            raise InfiniteTalkError(
                f"The stream takes nothing any more ({error.strerror or error}), after {self.written.frames} frames "
                f"({self.seconds:.1f} s)."
            ) from error


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """Frames as uint8, where they are: floats in [0, 1] rounded, what is beyond them cut off."""
    return frames if frames.dtype == torch.uint8 else (frames.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _mux(container: Any, stream: Any, packets: Sequence[Any], later: int = 0) -> None:
    """Write packets of another container's stream as those of `stream`, `later` ticks of their own time base."""
    for packet in packets:
        packet.pts, packet.dts = packet.pts + later, packet.dts + later
        packet.stream = stream
        container.mux(packet)


def _decoded_earlier(packets: list[Any], delay: int) -> list[Any]:
    """Packets in the order in which they are shown, each to be decoded `delay` ticks before."""
    for packet in packets:
        packet.dts = packet.pts - delay if delay else packet.dts
    return packets


def _boxes(data: bytes) -> list[tuple[bytes, int]]:
    """(kind, offset) of the outermost boxes of an MP4 (ISO/IEC 14496-12, 4.2)."""
    found, offset = [], 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        found.append((data[offset + 4 : offset + 8], offset))
        offset += size if size > 1 else int.from_bytes(data[offset + 8 : offset + 16], "big")
    return found


def _without_header(data: bytes) -> bytes:
    """The fragments of an MP4 alone."""
    return data[next(begin for kind, begin in _boxes(data) if kind == b"moof") :]


def _add_whole(path: Path, size: int, data: bytes) -> None:
    """Append boxes to a file of `size` bytes, all or none of them: readers skip them until the first header is there.

    A header of zeros is that of a box of unknown kind which lasts until the end of the file. What stands behind `size`
    is of a writer that was stopped, and goes.
    """
    with path.open("r+b") as file:
        file.truncate(size)
        try:
            file.seek(size)
            file.write(bytes(8))
            file.write(data[8:])
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            # Closing would try once more to write what does not fit.
            with contextlib.suppress(OSError):
                file.flush()
            os.truncate(path, size)
            raise
        file.seek(size)
        file.write(data[:8])
        file.flush()
        os.fsync(file.fileno())


class _SoundTrack:
    """A recording on its way into a container, piece by piece.

    Attributes:
        stream: of a container that writes nothing; its packets go into others.
        priming: ticks of the stream by which the encoder's first packet comes before the recording. Partial files hold
            the sound so much later, since fragments cannot begin before zero.
    """

    def __init__(self, sound: np.ndarray | torch.Tensor, rate: int | None) -> None:
        wave = _channels(sound)
        if wave.shape[1] == 0:
            raise InputError(f"Sound of shape {wave.shape} cannot be written: give one or two channels of samples.")
        if rate is None or rate < 1:
            raise InputError("The sound's samples a second are not known: give its rate.")
        self.wave = wave
        self._begin = 0  # sample of the recording that is the first of them
        self.rate = rate
        self.layout = "mono" if wave.shape[0] == 1 else "stereo"
        self.position = 0  # samples taken so far
        self._written = 0  # samples encoded so far, at the stream's rate
        self._stream_rate = self.rate if self.rate in SOUND_RATES else SOUND_RATES[-1]
        self._container: Any = av.open(os.devnull, "w", format="null")  # kept, which its stream does not do
        self.stream = self._container.add_stream("aac", rate=self._stream_rate, layout=self.layout)
        self.stream.codec_context.flags |= int(av.codec.context.Flags.global_header)
        self._container.start_encoding()
        self._resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self._stream_rate)
        self.priming = 0

    @property
    def seconds(self) -> Fraction:
        return Fraction(self._begin + self.wave.shape[1], self.rate)

    def extend(self, sound: np.ndarray | torch.Tensor, rate: int | None) -> None:
        """The recording goes on; what of it is encoded is dropped."""
        wave = _channels(sound)
        if rate != self.rate or len(wave) != len(self.wave):
            raise InputError(
                f"The sound changes from {len(self.wave)} channels at {self.rate} Hz to {len(wave)} at {rate}: a "
                "stream keeps them."
            )
        self.wave = np.concatenate([self.wave[:, self.position - self._begin :], wave], axis=1)
        self._begin = self.position

    def encode(self, until: Fraction) -> list[Any]:
        """Packets of the sound up to `until` seconds."""
        end = min(int(until * self.rate), self._begin + self.wave.shape[1])
        if end <= self.position:
            return []
        piece = np.ascontiguousarray(self.wave[:, self.position - self._begin : end - self._begin])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=self.layout)
        frame.sample_rate, frame.pts, frame.time_base = self.rate, self.position, Fraction(1, self.rate)
        self.position = end
        return self._encode_all(self._resampler.resample(frame))

    def finish(self) -> list[Any]:
        """The packets that the resampler and the encoder still hold."""
        rest = [] if self._stream_rate == self.rate else self._encode_all(self._resampler.resample(None))
        return rest + self.stream.encode(None)

    def _encode_all(self, frames: list[Any]) -> list[Any]:
        packets = []
        for frame in frames:
            if frame is None:
                continue
            frame.pts, frame.time_base = self._written, Fraction(1, self._stream_rate)
            self._written += frame.samples
            packets += self.stream.encode(frame)
        if packets and self.priming == 0:
            self.priming = max(0, -(packets[0].pts or 0))
        return packets


def _channels(sound: np.ndarray | torch.Tensor) -> np.ndarray:
    """Sound as float32 [channels, samples]."""
    wave = sound.detach().cpu().numpy() if isinstance(sound, torch.Tensor) else np.asarray(sound)
    wave = wave[None] if wave.ndim == 1 else wave
    if wave.ndim != 2 or wave.shape[0] not in (1, 2):
        raise InputError(f"Sound of shape {wave.shape} cannot be written: give one or two channels of samples.")
    return wave.astype(np.float32, copy=False)


def _h264() -> str:
    """The name of an H.264 encoder in this FFmpeg."""
    for name in ("libx264", "libopenh264", "h264"):
        try:
            return av.codec.Codec(name, "w").name
        except (ValueError, av.error.FFmpegError):
            continue
    raise InfiniteTalkError(
        "PyAV here has no H.264 encoder: install the one from PyPI (pip install --force-reinstall av)."
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_comment(path: str | Path) -> str:
    """The text that a media file carries in its metadata as its comment; empty where there is none.

    Raises InputError for a file that cannot be read.
    """
    path = Path(path).expanduser()
    check_file(path, "video")
    try:
        with open_media(path) as container:
            return str(container.metadata.get("comment", ""))
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise InputError(f"The video {path} cannot be read ({reason(error)}): give another file.") from error


class VideoFrames:
    """The frames of a video file as uint8 arrays [H, W, 3], by index at a given rate; only the latest ones are kept.

    They look as a player shows them: turned and mirrored by the file's display matrix, with square pixels, and with the
    colors that its tags mean (untagged: BT.601 below 720 lines, BT.709 from there on). Index 0 is the beginning of the
    file; where the images begin later than the sound, the first one stands until then.

    Args:
        path: any media file of `containers.FORMATS`.
        fps: the rate to read at; None: the file's own, on average. Frames of the file are repeated or left out to meet
            it.
        keep: frames behind the newest one that can still be asked for without reading the file anew.

    Attributes:
        times: when each frame of the file is shown, in seconds from its beginning.

    Raises:
        InputError: when the file is missing or holds no video.
    """

    def __init__(self, path: str | Path, fps: float | None = 25, keep: int = 128) -> None:
        self.path, self.keep = Path(path).expanduser(), keep
        check_file(self.path, "video")
        with self._explained(), open_media(self.path) as container:
            stream = self._stream(container)
            begin = _begin(container)
            # Presentation times without decoding; the last frame is shown as long as those before it, on average.
            stamps = [p.dts if p.pts is None else p.pts for p in container.demux(stream) if p.size]
            times = sorted(stamp * stream.time_base - begin for stamp in stamps if stamp is not None)
            if stream.codec_context.color_trc in HDR:
                logger.warning("%s is an HDR video: it is read without tone mapping, and its colors are pale.", path)
        if not times:
            raise InputError(f"{self.path} holds no frame: give another video.")
        last = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else Fraction(0)
        if fps is None:
            fps = float(1 / last) if last else 25.0
        self.fps, self.times = Fraction(fps).limit_denominator(1001), times
        self._length: int = max(1, round((times[-1] + last) * self.fps))
        self._restart()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._length:
            raise IndexError(f"frame {index} of {self._length}")
        if self._recent and index < self._next - len(self._recent):
            self._restart()
        with self._explained():
            while self._next <= index:
                self._recent.append(next(self._frames))
                self._next += 1
        return self._recent[index - self._next]

    def _restart(self) -> None:
        self._frames = self._read()
        self._recent: deque[np.ndarray] = deque(maxlen=self.keep)
        self._next = 0  # index of the next frame that `_frames` gives

    def _stream(self, container: Any) -> Any:
        stream = container.streams.best("video")  # no cover of an album, where there is another
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise InputError(f"{self.path} holds no video: give a video file.")
        return stream

    def _read(self) -> Iterator[np.ndarray]:
        """Frames at our rate: frame i is the one shown at i / fps. The last one is repeated without end."""
        index, shown = 0, None
        with open_media(self.path) as container:
            stream, begin = self._stream(container), _begin(container)
            stream.thread_type = "AUTO"
            for frame in decoded(container, stream, self.path):
                stamp = frame.dts if frame.pts is None else frame.pts
                if stamp is None:
                    continue
                shown = frame if shown is None else shown
                # Half a frame of tolerance: files round their times.
                while (Fraction(index) + Fraction(1, 2)) / self.fps < stamp * frame.time_base - begin:
                    yield _as_shown(shown, stream.sample_aspect_ratio)
                    index += 1
                shown = frame
            if shown is None:
                raise InputError(f"{self.path} holds no frame that can be decoded: give another video.")
            pixels = _as_shown(shown, stream.sample_aspect_ratio)
        while True:
            yield pixels

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise InputError(f"{self.path} cannot be read as a video ({reason(error)}): give an MP4, say.") from error


def _begin(container: Any) -> Fraction:
    """Time at which the first stream of a file begins, seconds."""
    return Fraction(container.start_time or 0, av.time_base)


def _as_shown(frame: Any, pixel_aspect: Fraction | None) -> np.ndarray:
    """Pixels [H, W, 3] of a decoded frame as a player shows it."""
    matrix = COLOR_MATRICES.get(int(frame.colorspace), BT709 if frame.height >= 720 else BT601)
    width = frame.width
    if pixel_aspect and Fraction(1, 4) <= pixel_aspect <= 4:  # others are nonsense
        width = max(1, round(frame.width * pixel_aspect))
    full = 2 if frame.color_range == 2 else 1  # of the values; RGB has all of them
    shown = frame.reformat(width=width, format="rgb24", src_colorspace=matrix, src_color_range=full, dst_color_range=2)
    pixels = shown.to_ndarray()
    display = frame.side_data.get("DISPLAYMATRIX")
    return pixels if display is None else _turned(pixels, np.frombuffer(display, np.int32))


def _turned(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """An image under a display matrix, nine numbers (a, b, u, c, d, v, x, y, w) with x' = a x + c y, y' = b x + d y.

    See ISO/IEC 14496-12, 6.2.2. Angles between the quarter turns are taken for the nearest one.
    """
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return np.ascontiguousarray(pixels[::-1] if d < 0 else pixels)
