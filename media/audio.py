"""Speech: reading recordings, and bringing them to one loudness.

Any file -> mono -> 16 kHz -> -23 LUFS (`load_speech`).
"""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..multitalk.wav2vec import SAMPLE_RATE
from ..wanvideo.errors import InputError
from .containers import check_file, decoded, open_media, reason

logger = logging.getLogger(__name__)

__all__ = [
    "TARGET_LUFS",
    "SpeechStream",
    "check_samples",
    "integrated_loudness",
    "load_speech",
    "normalize_loudness",
    "read_audio",
]

TARGET_LUFS = -23.0
"""Integrated loudness of the speech that InfiniteTalk was trained with (EBU R 128)."""

MIN_SECONDS = 0.04
"""One video frame at 25 frames per second; also the least that wav2vec2's convolutions need (400 samples) and more."""

RATES = (2000, 768_000)
"""Samples a second that a recording of speech may have."""

LOUDEST = 100.0
"""Of a sample: 40 dB above full scale. Floats peak near 1; integers that were taken for floats do at 127 or more, and
FFmpeg's AAC encoder does not end on the largest of them."""

MOST_CHANNELS = 16
"""Of a piece of speech, which may have fewer samples than channels."""

CANCELED = 1e-4
"""Energy of the channels' mean, of that of the channels: 40 dB less. One of n channels alone leaves 1 / n."""

TOLERANCE = 0.02
"""Seconds, half a video frame, by which time stamps may differ from the samples counted: containers round them."""

MAX_GAP = 600
"""Seconds without sound that are filled with silence; longer ones are taken for damage."""

OGG_BEGIN = b"OggS\0\2"
"""The first page of a stream (RFC 3533)."""

TIMED = {"asf", "flv", "gxf", "live_flv", "matroska", "mov", "mpeg", "mpegts", "mxf", "nut", "ogg", "rm", "webm", "wtv"}
"""Formats whose frames have a time. Of others FFmpeg counts it, by the rate that they begin with."""

Waveform = NDArray[np.float32]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_audio(path: str | Path, most: float | None = None) -> tuple[Waveform, int]:
    """The recording at `path` as mono float32 samples [n] at its own rate (Hz); channels are averaged.

    WAV, FLAC, AIFF and others through libsndfile; what that cannot read (MP3, M4A, MP4, WebM, ...) through PyAV, where
    time stamps count: sample 0 is the beginning of the file, silence stands for what is missing before the sound and in
    gaps. Raises InputError when the file is missing, is no recording, holds no samples, states an absurd rate, or lasts
    longer than `most` seconds, of which no more is read into memory.
    """
    path = Path(path).expanduser()
    check_file(path, "recording")
    import soundfile

    try:
        waveform, rate = _read_soundfile(path, most)
    except soundfile.SoundFileError as error:
        logger.debug("libsndfile cannot read %s (%s): trying PyAV", path, error)
        waveform, rate = _read_av(path, most)
    if waveform.size == 0:
        raise InputError(f"The recording {path} holds no samples.")
    return waveform, rate


def _read_soundfile(path: Path, most: float | None) -> tuple[Waveform, int]:
    import soundfile

    # Without its name, by which libsndfile takes anything named .au, .snd or .vox for samples without a header.
    with path.open("rb") as content, soundfile.SoundFile(content.fileno(), closefd=False) as file:
        # It ends where another rate, or another file that was appended, begins.
        if file.format == "MP3" or (file.format == "OGG" and path.read_bytes().count(OGG_BEGIN) > 1):
            return _read_av(path, most)
        rate = _checked_rate(int(file.samplerate), f"The recording {path}")
        # Block by block, since neither the stated length nor seeking can be relied on.
        blocks, mix = [], _Mix()
        while len(block := file.read(1 << 18, dtype="float32", always_2d=True)):
            blocks.append(mix.mean(block.T))
            _check_length(sum(map(len, blocks)), rate, path, most)
        mix.check(f"The recording {path}")
    if not blocks and path.stat().st_size > 1024:
        # A header that was never completed states a length of 0; FFmpeg reads on to the end.
        try:
            return _read_av(path, most)
        except InputError as error:
            logger.debug("%s", error)
    return np.concatenate([np.zeros(0, np.float32), *blocks]), rate


def _read_av(path: Path, most: float | None) -> tuple[Waveform, int]:
    import av

    try:
        with open_media(path) as container:
            stream = container.streams.best("audio")
            if stream is None:
                raise InputError(f"{path} holds no sound.")
            begin = Fraction(container.start_time or 0, av.time_base)
            track = _Track(path, begin if TIMED & set(container.format.name.split(",")) else None, most)
            for frame in decoded(container, stream, path):
                track.add(frame)
            return track.samples()
    except InputError:
        raise
    except (OSError, ValueError, av.FFmpegError) as error:
        raise InputError(
            f"{path} cannot be read as a recording ({reason(error)}); convert it to WAV, FLAC or MP3."
        ) from error


class _Mix:
    """Channels on their way to one, piece by piece."""

    def __init__(self) -> None:
        self._energies = np.zeros(2)  # of the channels, of their mean

    def mean(self, channels: NDArray[Any]) -> NDArray[Any]:
        """[channels, n] -> [n]."""
        if len(channels) == 1:
            only: NDArray[Any] = channels[0]
            return only
        mono: NDArray[Any] = channels.mean(axis=0)
        self._energies += [np.square(part, dtype=np.float64).mean(axis=0).sum() for part in (channels, mono[None])]
        return mono

    def check(self, name: str) -> None:
        """Raise InputError where one channel is the other upside down: nothing would be left of the speech."""
        before, after = self._energies
        if after < CANCELED * before:
            raise InputError(f"{name} has channels that cancel each other: give one of them as a mono file.")


class _Track:
    """Decoded sound, placed by its time stamps, at the rate that it begins with, as the mean of its channels.

    Args:
        begin: time of sample 0, seconds; None where the file has no time stamps, and frames follow one another.
        most: see `read_audio`.
    """

    def __init__(self, path: Path, begin: Fraction | None, most: float | None = None) -> None:
        self.path, self.begin, self.most = path, begin, most
        self.rate = 0
        self._pieces: list[NDArray[Any]] = []
        self._length = 0
        self._form: tuple[int, str, str] | None = None
        self._resampler: Any = None
        self._mix = _Mix()

    def add(self, frame: Any) -> None:
        """Append a frame; where it comes later than what is there, after silence, where earlier, without its front."""
        import av

        form = (frame.sample_rate, frame.layout.name, frame.format.name)
        if form != self._form:  # streams may change midway
            self._finish()
            self.rate = self.rate or _checked_rate(frame.sample_rate, f"The recording {self.path}")
            self._form, self._resampler = form, av.AudioResampler(format="fltp", layout=frame.layout, rate=self.rate)
        ahead = 0
        if frame.pts is not None and self.begin is not None:
            time = frame.pts * frame.time_base
            ahead = round((time - self.begin) * self.rate) - self._length
            if ahead < -self.rate:  # stamps that begin again, where files were put together
                self.begin, ahead = time - Fraction(self._length, self.rate), 0
        if ahead > MAX_GAP * self.rate:
            raise InputError(
                f"The time stamps of {self.path} leave {ahead / self.rate:.0f} s without sound at "
                f"{self._length / self.rate:.1f} s; convert it to WAV, FLAC or MP3."
            )
        if abs(ahead) <= TOLERANCE * self.rate:
            ahead = 0
        if ahead > 0:
            self._append(np.zeros(ahead, np.float32))
        sound = [self._mix.mean(part.to_ndarray()) for part in self._resampler.resample(frame)]
        self._append(np.concatenate([np.zeros(0, np.float32), *sound])[max(0, -ahead) :])

    def samples(self) -> tuple[Waveform, int]:
        """All of it and its rate in Hz. Raises InputError where its channels cancel each other."""
        self._finish()
        self._mix.check(f"The recording {self.path}")
        return np.concatenate([np.zeros(0, np.float32), *self._pieces]).astype(np.float32, copy=False), self.rate

    def _append(self, sound: NDArray[Any]) -> None:
        self._pieces.append(sound)
        self._length += sound.size
        _check_length(self._length, self.rate, self.path, self.most)

    def _finish(self) -> None:
        """Take what a resampler of another rate still holds."""
        if self._resampler is not None and self._form is not None and self._form[0] != self.rate:
            for part in self._resampler.resample(None):
                self._append(self._mix.mean(part.to_ndarray()))


def _check_length(samples: int, rate: int, path: Path, most: float | None) -> None:
    if most is not None and samples > most * rate:
        raise InputError(f"The recording {path} lasts longer than {most:g} s: give a shorter one.")


def _checked_rate(rate: int, name: str) -> int:
    low, high = RATES
    if not low <= rate <= high:
        raise InputError(f"{name} states {rate} samples a second; speech has {low} to {high}: export it again.")
    return rate


def load_speech(
    source: str | Path | NDArray[Any] | Tensor,
    rate: int | None = None,
    *,
    target_lufs: float | None = TARGET_LUFS,
) -> Waveform:
    """Speech as 16 kHz mono float32 [n], brought to `target_lufs` (None: left as loud as it is).

    Args:
        source: a file, or float samples [n] or [channels, n] with `rate` in Hz.
        rate: of the samples; None for a file, which states its own.

    Raises InputError for a file that cannot be read, samples that are NaN, infinite or above `LOUDEST`, and less than
    0.04 s. Silence passes, with a warning.
    """
    if isinstance(source, str | Path):
        if rate is not None:
            raise InputError("A recording's file states its sample rate: give a rate only with samples.")
        name = f"The recording {source}"
        waveform, rate = read_audio(source)
    else:
        name = "The recording"
        if rate is None:
            raise InputError("Samples need their rate in Hz.")
        waveform = _mono(source)
    check_samples(waveform, rate, name)
    if waveform.size < MIN_SECONDS * rate:
        raise InputError(f"{name} is too short: {waveform.size / rate:.3f} s, at least {MIN_SECONDS} s are needed.")
    _check_peak(waveform, name)
    speech = _resample(waveform, rate)
    del waveform  # the loudness is measured in double precision: no need to hold both
    if not speech.any():
        logger.warning("%s is silent", name)
    return speech if target_lufs is None else normalize_loudness(speech, target_lufs=target_lufs)


def _check_peak(waveform: Waveform, name: str) -> None:
    peak = max(float(waveform.max()), -float(waveform.min()))
    if peak > LOUDEST:
        raise InputError(f"{name} has samples of up to {peak:g}; those of sound lie within -1 and 1: export it again.")


class SpeechStream:
    """Speech that comes in pieces, as 16 kHz mono float32, as loud as it is; the same for pieces of any size.

    Args:
        rate: of the pieces, Hz.

    Raises InputError for a rate that no speech has.
    """

    def __init__(self, rate: int) -> None:
        self.rate = _checked_rate(rate, "The speech")
        self._mix = _Mix()
        self._resampler: Any = None
        if rate != SAMPLE_RATE:
            import soxr

            self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    def mono(self, piece: NDArray[Any] | Tensor) -> Waveform:
        """Float samples [n] or [channels, n] as samples [n] at their own rate.

        Raises InputError for samples that are NaN, infinite or above `LOUDEST`.
        """
        channels = _floats(piece)
        if len(channels) > MOST_CHANNELS:
            raise InputError(f"Samples have the shape [n] or [channels, n]; {list(channels.shape)} looks transposed.")
        waveform = np.array(self._mix.mean(channels), dtype=np.float32)
        check_samples(waveform, self.rate, "The speech")
        if waveform.size:
            _check_peak(waveform, "The speech")
        return waveform

    def resample(self, waveform: Waveform, last: bool = False) -> Waveform:
        """The 16 kHz samples that are known with these [n]; the resampler holds back some ms until the `last`.

        Raises InputError at the last, where the channels of all pieces cancel each other.
        """
        if last:
            self._mix.check("The speech")
        if self._resampler is None:
            return waveform
        resampled: Waveform = self._resampler.resample_chunk(waveform, last=last)
        return resampled


def check_samples(waveform: Waveform, rate: int, name: str) -> None:
    """Raise InputError for a rate that no speech has, and for samples [n] that are NaN or infinite."""
    _checked_rate(rate, name)
    bad = np.flatnonzero(~np.isfinite(waveform))
    if bad.size:
        raise InputError(
            f"{name} has {bad.size} samples that are NaN or infinite, the first at {bad[0] / rate:.2f} s; "
            "export it again."
        )


def _mono(samples: NDArray[Any] | Tensor) -> Waveform:
    channels = _floats(samples)
    if len(channels) > 1 and len(channels) > channels.shape[1]:
        raise InputError(f"Samples have the shape [n] or [channels, n]; {list(channels.shape)} looks transposed.")
    mix = _Mix()
    mono = mix.mean(channels)
    mix.check("The recording")
    return np.array(mono, dtype=np.float32)


def _floats(samples: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Samples [n] or [channels, n] as floats [channels, n]."""
    if isinstance(samples, Tensor):  # bfloat16 is nothing to numpy
        samples = (samples.float() if samples.is_floating_point() else samples).detach().cpu().numpy()
    array = np.asarray(samples)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"Samples are floats in [-1, 1]; got {array.dtype}, divide by its largest value first.")
    if array.ndim not in (1, 2) or (array.ndim == 2 and len(array) == 0):
        raise InputError(f"Samples have the shape [n] or [channels, n]; got {list(array.shape)}.")
    return array[None] if array.ndim == 1 else array


def _resample(waveform: Waveform, rate: int) -> Waveform:
    if rate == SAMPLE_RATE:
        return waveform
    import soxr

    resampled: NDArray[np.float32] = soxr.resample(waveform, rate, SAMPLE_RATE, quality="HQ").astype(
        np.float32, copy=False
    )
    return resampled


# --- loudness --------------------------------------------------------------------------------------------------------


def integrated_loudness(waveform: Waveform, rate: int = SAMPLE_RATE) -> float:
    """LUFS after ITU-R BS.1770-4 (gated); -inf for silence and for less than one 0.4 s block."""
    import pyloudnorm

    meter = pyloudnorm.Meter(rate)
    if waveform.size < meter.block_size * rate:
        return float("-inf")
    return float(meter.integrated_loudness(waveform))


def normalize_loudness(waveform: Waveform, rate: int = SAMPLE_RATE, target_lufs: float = TARGET_LUFS) -> Waveform:
    """`waveform` [n] scaled to `target_lufs`, float32; unchanged where the loudness has no meaning (silence).

    Peaks may pass 1: nothing is clipped.
    """
    loudness = integrated_loudness(waveform, rate)
    if not abs(loudness) <= 100:
        logger.info("The recording has no measurable loudness (%s LUFS): its level stays as it is", loudness)
        return waveform.astype(np.float32, copy=False)
    gain = 10.0 ** ((target_lufs - loudness) / 20.0)
    leveled: Waveform = (waveform * np.float32(gain)).astype(np.float32, copy=False)
    return leveled
