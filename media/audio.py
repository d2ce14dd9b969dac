"""Speech: reading recordings, and bringing them to one loudness.

Any file -> mono -> 16 kHz -> -23 LUFS (`load_speech`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..multitalk.wav2vec import SAMPLE_RATE
from ..wanvideo.errors import InputError

logger = logging.getLogger(__name__)

__all__ = [
    "TARGET_LUFS",
    "integrated_loudness",
    "load_speech",
    "normalize_loudness",
    "read_audio",
]

TARGET_LUFS = -23.0
"""Integrated loudness of the speech that InfiniteTalk was trained with (EBU R 128)."""

MIN_SECONDS = 0.04
"""One video frame at 25 frames per second; also the least that wav2vec2's convolutions need (400 samples) and more."""

Waveform = NDArray[np.float32]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_audio(path: str | Path) -> tuple[Waveform, int]:
    """The recording at `path` as mono float32 samples [n] at its own rate (Hz); channels are averaged.

    WAV, FLAC, OGG, MP3 and others through libsndfile; what that cannot read (M4A, MP4, WebM, ...) through PyAV.
    Raises InputError when the file is missing, is no recording, or holds no samples.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"The recording {path} does not exist.")
    if path.is_dir():
        raise InputError(f"The recording {path} is a folder; give the file itself.")
    if path.stat().st_size == 0:
        raise InputError(f"The recording {path} is an empty file.")
    import soundfile

    try:
        waveform, rate = _read_soundfile(path)
    except soundfile.SoundFileError as error:
        logger.debug("libsndfile cannot read %s (%s): trying PyAV", path, error)
        waveform, rate = _read_av(path)
    if waveform.size == 0:
        raise InputError(f"The recording {path} holds no samples.")
    return waveform, rate


def _read_soundfile(path: Path) -> tuple[Waveform, int]:
    import soundfile

    with soundfile.SoundFile(path) as file:
        # Block by block into one array, so that a long recording is in memory once, without its channels.
        mono = np.empty(max(int(file.frames), 0), np.float32)
        filled = 0
        for block in file.blocks(blocksize=1 << 18, dtype="float32", always_2d=True):
            part = block.mean(axis=1)[: mono.size - filled]
            mono[filled : filled + part.size] = part
            filled += part.size
        return mono[:filled], int(file.samplerate)


def _read_av(path: Path) -> tuple[Waveform, int]:
    import av

    pieces: list[NDArray[Any]] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise InputError(f"{path} holds no sound.")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            for frame in container.decode(stream):
                pieces.extend(part.to_ndarray().mean(axis=0) for part in planar.resample(frame))
            rate = int(stream.rate)
    except av.FFmpegError as error:
        raise InputError(
            f"{path} cannot be read as a recording ({error.strerror}); convert it to WAV, FLAC or MP3."
        ) from error
    return np.concatenate([np.zeros(0, np.float32), *pieces]).astype(np.float32, copy=False), rate


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

    Raises InputError for a file that cannot be read, NaN or infinite samples, and less than 0.04 s. Silence passes,
    with a warning.
    """
    if isinstance(source, str | Path):
        if rate is not None:
            raise InputError("A recording's file states its sample rate: give a rate only with samples.")
        name = f"The recording {source}"
        waveform, rate = read_audio(source)
    else:
        name = "The recording"
        if rate is None or rate <= 0:
            raise InputError(f"Samples need their rate in Hz, a positive number; got {rate}.")
        waveform = _mono(source)
    bad = np.flatnonzero(~np.isfinite(waveform))
    if bad.size:
        raise InputError(
            f"{name} has {bad.size} samples that are NaN or infinite, the first at {bad[0] / rate:.2f} s; "
            "export it again."
        )
    if waveform.size < MIN_SECONDS * rate:
        raise InputError(f"{name} is too short: {waveform.size / rate:.3f} s, at least {MIN_SECONDS} s are needed.")
    speech = _resample(waveform, rate)
    del waveform  # the loudness is measured in double precision: no need to hold both
    if not speech.any():
        logger.warning("%s is silent", name)
    return speech if target_lufs is None else normalize_loudness(speech, target_lufs=target_lufs)


def _mono(samples: NDArray[Any] | Tensor) -> Waveform:
    array = samples.detach().cpu().float().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"Samples are floats in [-1, 1]; got {array.dtype}, divide by its largest value first.")
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise InputError(f"Samples have the shape [n] or [channels, n]; {list(array.shape)} looks transposed.")
    if array.ndim not in (1, 2):
        raise InputError(f"Samples have the shape [n] or [channels, n]; got {list(array.shape)}.")
    mono = array if array.ndim == 1 else array.mean(axis=0)
    return np.array(mono, dtype=np.float32)


def _resample(waveform: Waveform, rate: int) -> Waveform:
    if rate == SAMPLE_RATE:
        return waveform
    import soxr

    return soxr.resample(waveform, rate, SAMPLE_RATE, quality="HQ").astype(np.float32, copy=False)


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
    return (waveform * np.float32(gain)).astype(np.float32, copy=False)
