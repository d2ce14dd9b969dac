"""Video files: windows of frames appended with their sound as they come, and source videos read frame by frame.

While it grows, the file is a fragmented MP4: every second of it plays from the moment it is on the disk, whatever
happens to the process. When the writer is closed, the streams are copied once into an ordinary MP4 of the same name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import av.error
import numpy as np
import torch

from ..wanvideo.errors import InfiniteTalkError, InputError

__all__ = ["VideoFrames", "VideoWriter", "check_path"]

logger = logging.getLogger(__name__)

SOUND_RATES = (32000, 44100, 48000)
"""Hz that are kept. Others become 48 kHz: at lower rates one AAC packet lasts longer than a video frame."""

BT709 = 1
"""The code of ITU-R BT.709 in the color fields of a stream (ITU-T H.273)."""


def check_path(path: Path) -> None:
    """Raises InputError for a path that cannot be the name of a video, whether or not it can be written to."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the video file to write, such as {path / 'video.mp4'}.")
    if path.suffix.lower() != ".mp4":
        raise InputError(f"The video {path} would not be an MP4: let its name end in .mp4.")


class VideoWriter:
    """Writes an H.264 (yuv420p) MP4 with AAC sound. Leaving its context, for whatever reason, ends the file well.

    Args:
        path: the file, ending in .mp4; overwritten. Nothing is made before the first frames come.
        fps: frames a second.
        sound: the recording, float32 in [-1, 1], [samples] or [channels, samples] of one or two channels; or None. It
            begins with the first frame, and is cut where it would outlast the last one by a frame or more.
        rate: samples a second of the recording.
        crf: constant rate factor of x264; 0 is lossless, 18 looks so.

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
    ) -> None:
        self.path = Path(path)
        check_path(self.path)
        if not fps > 0:
            raise InputError(f"{fps} frames a second make no video: InfiniteTalk uses 25.")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.crf = crf
        self.frames = 0  # given to the encoder so far
        self._size: tuple[int, int] | None = None  # height, width as given
        self._sound = None if sound is None else _SoundTrack(sound, rate)
        self._container: Any = None
        self._video: Any = None
        self._failed = False

    @property
    def seconds(self) -> float:
        """Length of what has been appended."""
        return float(self.frames / self.fps)

    def append(self, frames: torch.Tensor) -> None:
        """Add frames [n, H, W, 3], uint8 or float in [0, 1], all of one size, and the sound that goes with them.

        Raises InfiniteTalkError when the file cannot be written; what is on the disk by then stays playable.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise InputError(f"Frames of shape {tuple(frames.shape)} cannot be written: give [n, height, width, 3].")
        size = (int(frames.shape[1]), int(frames.shape[2]))
        with self._explained():
            if self._container is None:
                self._open(size)
            elif size != self._size:
                raise InputError(f"Frames of {size[1]} x {size[0]} do not fit this video: all must be of one size.")
            for frame in frames:
                self._encode_frame(frame)
                # Frame by frame, so that both streams are interleaved as players want them.
                self._encode_sound(Fraction(self.frames) / self.fps)

    def close(self) -> None:
        """End the file. What was appended becomes an ordinary MP4; without frames there is no file."""
        if self._container is None:
            return
        with self._explained():
            container, self._container = self._container, None
            try:
                if not self._failed:
                    self._finish_streams(container)
            finally:
                container.close()
            if not self._failed:
                _make_ordinary(self.path)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The error under way says more than one of closing; what is on the disk plays either way.
        try:
            self.close()
        except InfiniteTalkError as closing:
            logger.warning("%s", closing)

    # --- encoding

    def _open(self, size: tuple[int, int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = {"movflags": "frag_keyframe+delay_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(self.path), "w", format="mp4", options=options)
        self._size = size
        # Looking further ahead would hold back more frames from the disk than it saves in bytes.
        video = self._container.add_stream(
            _h264(), rate=self.fps, options={"crf": str(self.crf), "preset": "medium", "rc-lookahead": "12"}
        )
        video.height, video.width = (side + side % 2 for side in size)  # 4:2:0 halves both
        video.pix_fmt = "yuv420p"
        video.codec_context.gop_size = max(1, round(self.fps))  # a fragment a second
        video.codec_context.time_base = 1 / self.fps
        video.codec_context.colorspace = video.codec_context.color_primaries = BT709
        video.codec_context.color_trc = BT709
        self._video = video
        if self._sound is not None:
            self._sound.open(self._container)

    def _encode_frame(self, frame: torch.Tensor) -> None:
        pixels = frame if frame.dtype == torch.uint8 else (frame.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        rgb = pixels.cpu().numpy()
        height, width = rgb.shape[:2]
        rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        encoded = encoded.reformat(format="yuv420p", dst_colorspace="ITU709")
        encoded.pts, encoded.time_base = self.frames, 1 / self.fps
        self._mux(self._container, self._video.encode(encoded))
        self.frames += 1

    def _encode_sound(self, until: Fraction) -> None:
        if self._sound is not None:
            self._mux(self._container, self._sound.encode(until))

    def _finish_streams(self, container: Any) -> None:
        self._mux(container, self._video.encode(None))
        if self._sound is not None:
            # A recording that ends within a frame of the video is written whole.
            if self._sound.seconds < Fraction(self.frames + 1) / self.fps:
                self._mux(container, self._sound.encode(self._sound.seconds))
            self._mux(container, self._sound.finish())

    @staticmethod
    def _mux(container: Any, packets: list[Any]) -> None:
        for packet in packets:
            container.mux(packet)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the file system and of FFmpeg as one sentence that says where the video stands."""
        try:
            yield
        except InfiniteTalkError:
            raise
        except (OSError, av.error.FFmpegError) as error:
            self._failed = True
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "there is no space left for it" if full else str(error)
            kept = f"; what was written before plays ({self.seconds:.1f} s were made)" if self.frames else ""
            todo = "free some space, or write elsewhere" if full else "check the path and its permissions"
            sentence = f"The video {self.path} could not be written: {why}{kept}. {todo.capitalize()}."
            raise InfiniteTalkError(sentence) from error


class _SoundTrack:
    """A recording on its way into a container, piece by piece."""

    def __init__(self, sound: np.ndarray | torch.Tensor, rate: int | None) -> None:
        wave = sound.detach().cpu().numpy() if isinstance(sound, torch.Tensor) else np.asarray(sound)
        wave = wave[None] if wave.ndim == 1 else wave
        if wave.ndim != 2 or wave.shape[0] not in (1, 2) or wave.shape[1] == 0:
            raise InputError(f"Sound of shape {wave.shape} cannot be written: give one or two channels of samples.")
        if rate is None or rate < 1:
            raise InputError("The sound's samples a second are not known: give its rate.")
        self.wave = wave.astype(np.float32, copy=False)
        self.rate = rate
        self.layout = "mono" if wave.shape[0] == 1 else "stereo"
        self.position = 0  # samples taken so far
        self._written = 0  # samples encoded so far, at the stream's rate

    @property
    def seconds(self) -> Fraction:
        return Fraction(self.wave.shape[1], self.rate)

    def open(self, container: Any) -> None:
        self._stream_rate = self.rate if self.rate in SOUND_RATES else SOUND_RATES[-1]
        self._stream = container.add_stream("aac", rate=self._stream_rate, layout=self.layout)
        self._resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self._stream_rate)

    def encode(self, until: Fraction) -> list[Any]:
        """Packets of the sound up to `until` seconds."""
        end = min(int(until * self.rate), self.wave.shape[1])
        if end <= self.position:
            return []
        piece = np.ascontiguousarray(self.wave[:, self.position : end])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=self.layout)
        frame.sample_rate, frame.pts, frame.time_base = self.rate, self.position, Fraction(1, self.rate)
        self.position = end
        return self._encode_all(self._resampler.resample(frame))

    def finish(self) -> list[Any]:
        """The packets that the resampler and the encoder still hold."""
        rest = [] if self._stream_rate == self.rate else self._encode_all(self._resampler.resample(None))
        return rest + self._stream.encode(None)

    def _encode_all(self, frames: list[Any]) -> list[Any]:
        packets = []
        for frame in frames:
            if frame is None:
                continue
            frame.pts, frame.time_base = self._written, Fraction(1, self._stream_rate)
            self._written += frame.samples
            packets += self._stream.encode(frame)
        return packets


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


def _make_ordinary(path: Path) -> None:
    """Copy the streams of a fragmented MP4 into an ordinary one of the same name, its index in front."""
    copy = path.with_name(f".{path.stem}.finishing.mp4")
    try:
        with (
            av.open(str(path)) as source,
            av.open(str(copy), "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            streams = {s.index: target.add_stream_from_template(s, opaque=True) for s in source.streams}
            for packet in source.demux():
                if packet.dts is not None:  # the empty packets that end each stream
                    packet.stream = streams[packet.stream.index]
                    target.mux(packet)
        os.replace(copy, path)
    finally:
        copy.unlink(missing_ok=True)


class VideoFrames:
    """The frames of a video file as uint8 arrays [H, W, 3], by index at a given rate; only the latest ones are kept.

    Args:
        path: any file that FFmpeg reads.
        fps: the rate to read at. Frames of the file are repeated or left out to meet it.
        keep: frames behind the newest one that can still be asked for without reading the file anew.

    Raises:
        InputError: when the file is missing or holds no video.
    """

    def __init__(self, path: str | Path, fps: float = 25, keep: int = 128) -> None:
        self.path, self.fps, self.keep = Path(path), Fraction(fps).limit_denominator(1001), keep
        with self._explained(), av.open(str(self.path)) as container:
            if not container.streams.video:
                raise InputError(f"{self.path} holds no video: give a video file.")
            stream = container.streams.video[0]
            # Presentation times without decoding; the last frame is shown as long as those before it, on average.
            times = sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None)
        if not times:
            raise InputError(f"{self.path} holds no frame: give another video.")
        last = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        self._length = max(1, round((times[-1] - times[0] + last) * float(self.fps)))
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

    def _read(self) -> Iterator[np.ndarray]:
        """Frames at our rate: frame i is the one shown at i / fps. The last one is repeated without end."""
        index, shown, begin = 0, None, None
        with av.open(str(self.path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                if frame.pts is None:
                    continue
                time = frame.pts * frame.time_base
                begin = time if begin is None else begin
                # Half a frame of tolerance: files round their times.
                while shown is not None and (Fraction(index) + Fraction(1, 2)) / self.fps < time - begin:
                    yield shown.to_ndarray(format="rgb24")
                    index += 1
                shown = frame
        if shown is None:
            raise InputError(f"{self.path} holds no frame that can be decoded: give another video.")
        pixels = shown.to_ndarray(format="rgb24")
        while True:
            yield pixels

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise InputError(f"There is no video at {self.path}: check the path.") from None
        except (OSError, av.error.FFmpegError) as error:
            raise InputError(f"{self.path} cannot be read as a video ({error}): give an MP4, say.") from None
