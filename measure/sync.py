"""A mouth's opening against speech: how closely it follows, how late, and whether it closes in silence.

Both are compared between 1 and 10 Hz, where syllables are: what is slower, such as a pause at the end that half of all
recordings have, makes foreign recordings alike, and frames say nothing about what is faster. Each is clipped at twice
its deviation, so that one onset does not count for a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt

from ..multitalk.wav2vec import SAMPLE_RATE

__all__ = ["RATE", "SHIFTS", "Curve", "correlations", "in_band", "loudness", "open_in_silence"]

Floats = NDArray[np.float64]

RATE = 100
"""Hz, at which both are compared: shifts are found to 10 ms."""

SHIFTS = np.arange(-50, 51) / RATE
"""Seconds by which the mouth may come after the sound."""

BAND = (1.0, 10.0)
"""Hz."""

SPEECH = (150, 4000)
"""Hz, of the sound whose level counts."""

WINDOW = 1024
"""Samples at 16 kHz, 64 ms."""

LOUDEST_TO_CLOSED = 40.0
"""dB, from the level that speech exceeds one twentieth of the time to that of a closed mouth."""


def loudness(speech: NDArray[np.floating]) -> Floats:
    """How loud speech is, 0 to 1, at `RATE`: [n * RATE / 16000], value i around i / RATE seconds.

    The level in dB between 150 and 4000 Hz over 64 ms, from 40 dB below its 95th percentile, or from 3 dB above its
    5th where that is louder (noise), to the 95th. All zeros for silence.

    Args:
        speech: mono samples at 16 kHz [n].
    """
    hop = SAMPLE_RATE // RATE
    count = len(speech) // hop
    if count == 0:
        return np.zeros(0)
    padded = np.pad(np.asarray(speech, np.float64), WINDOW // 2)
    hann, hertz = np.hanning(WINDOW), np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    inside = (hertz >= SPEECH[0]) & (hertz < SPEECH[1])
    power = np.empty(count)
    for begin in range(0, count, 4096):  # an hour at once would take gigabytes
        starts = hop * np.arange(begin, min(begin + 4096, count))
        spectrum = np.fft.rfft(padded[starts[:, None] + np.arange(WINDOW)] * hann, axis=1)
        power[begin : begin + 4096] = (np.abs(spectrum) ** 2)[:, inside].sum(1) / (WINDOW * (hann**2).sum())
    level = 10 * np.log10(power + 1e-10)
    noise, loud = np.percentile(level, [5, 95])
    if loud < -75:
        return np.zeros(count)
    closed = max(loud - LOUDEST_TO_CLOSED, min(noise + 3, loud - 6))
    result: Floats = np.clip((level - closed) / (loud - closed), 0, 1)
    return result


def in_band(signal: Floats) -> Floats:
    """A signal [n] at `RATE` between 1 and 10 Hz, clipped at twice its deviation."""
    sections = butter(2, BAND, "bandpass", fs=RATE, output="sos")
    filtered: Floats = sosfiltfilt(sections, signal - signal.mean())
    most = 2 * float(filtered.std())
    return np.clip(filtered, -most, most)


@dataclass(frozen=True)
class Curve:
    """Correlation [shifts] of a mouth with speech, for each of `SHIFTS`.

    Attributes:
        chance: what the same mouth and speech have by chance: the highest correlation of a second of shifts, which 95
            of 100 such seconds from 1.5 s on stay below; the recording goes on with its beginning. NaN below 6 s.
    """

    values: Floats
    chance: float

    @property
    def best(self) -> float:
        return float(self.values.max())

    @property
    def lag(self) -> float:
        """Seconds by which the mouth comes after the sound, where the correlation is highest."""
        return float(SHIFTS[int(self.values.argmax())])


def correlations(opening: Floats, fps: float, loud: Floats) -> Curve | None:
    """How closely a mouth follows speech, for each shift; None where one of the two does not move.

    Args:
        opening: [frames]; frame f stands for the time of its middle, (f + 1/2) / fps.
        loud: [samples] of `loudness`; both begin at 0 s.
    """
    count = min(int(len(opening) / fps * RATE), len(loud))
    if count < RATE:
        return None
    times = np.arange(count) / RATE
    mouth = in_band(np.interp(times, (np.arange(len(opening)) + 0.5) / fps, opening))
    sound = in_band(loud[:count])
    values = []
    for steps in np.round(SHIFTS * RATE).astype(int):
        late, early = mouth[max(0, steps) : count + min(0, steps)], sound[max(0, -steps) : count - max(0, steps)]
        late, early = late - late.mean(), early - early.mean()
        size = float(np.linalg.norm(late) * np.linalg.norm(early))
        if size < 1e-9:
            return None
        values.append(float(late @ early) / size)
    return Curve(np.array(values), _chance(mouth, sound))


def _chance(mouth: Floats, sound: Floats) -> float:
    """See `Curve.chance`."""
    count = len(mouth)
    if count < 6 * RATE:
        return float("nan")
    mouth, sound = mouth - mouth.mean(), sound - sound.mean()
    circular = np.fft.irfft(np.fft.rfft(mouth) * np.fft.rfft(sound).conj(), count)
    circular /= np.linalg.norm(mouth) * np.linalg.norm(sound)
    far = circular[int(1.5 * RATE) : count - int(1.5 * RATE)]
    highest = far[: len(far) // RATE * RATE].reshape(-1, RATE).max(1)
    return float(np.percentile(highest, 95))


def open_in_silence(
    opening: Floats, fps: float, loud: Floats, lag: float = 0.0, closed: float | None = None
) -> float | None:
    """How far a mouth is open in pauses: 0 is closed, 1 as in loud speech.

    A pause is where the sound has been below a tenth of its range for 0.2 s and stays so for 0.1 s; loud is above
    seven tenths. None without a quarter of a second of both.

    Args:
        lag: seconds by which the mouth comes after the sound.
        closed: opening of a closed mouth; None: the second percentile, which is that of a mouth that closes at times.
    """
    quiet = loud < 0.1
    pause = quiet.copy()
    for step in range(-int(0.1 * RATE), int(0.2 * RATE) + 1):
        pause &= np.roll(quiet, step)
    times = (np.arange(len(opening)) + 0.5) / fps - lag
    index = np.round(times * RATE).astype(int)
    inside = (index >= 0) & (index < len(loud))
    index, seen = index[inside], opening[inside]
    silent, speaking = seen[pause[index]], seen[loud[index] > 0.7]
    if min(len(silent), len(speaking)) < fps / 4:
        return None
    if closed is None:
        closed = float(np.percentile(seen, 2))
    range_ = float(np.median(speaking)) - closed
    return float((np.median(silent) - closed) / range_) if range_ > 1e-9 else None
