"""The rule from sound to mouth that the demo model learns, and that its lip-sync is measured against.

A recording at 16 kHz and -23 LUFS, 25 video frames a second. Frame f looks at a Hann window of 64 ms around its middle,
(f + 1/2) / 25 s.

    level    L = 10 log10 of the mean power between 150 and 4000 Hz, dB of full scale
    quiet    q = max(-48, 5th percentile of L over the recording + 6): hiss and hum do not open a mouth
    opening  clip((L - q) / max(-20 - q, 6), 0, 1), smoothed over three frames by (1, 2, 1) / 4
    front    10 log10 of the power at 1200 to 3200 Hz over that at 250 to 900 Hz: high for i and e, low for u and o
    width    clip((front + 25) / 25, 0, 1), smoothed twice alike; drawn to 1/2 where the opening is below 1/4
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FPS", "SAMPLE_RATE", "Mouth", "mouth_of"]

FPS = 25
SAMPLE_RATE = 16_000
WINDOW = 1024
LOUD = -20.0  # dB, where the mouth is fully open
QUIET = -48.0  # dB, below which it stays closed in any recording

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Mouth:
    """What the mouth does in each video frame; both [frames] float32 in [0, 1]."""

    opening: Floats  # 0 closed, 1 wide open
    width: Floats  # 0 round, 1 spread


def mouth_of(speech: NDArray[np.floating], frames: int | None = None) -> Mouth:
    """The mouth of a recording: mono samples [n] at 16 kHz and -23 LUFS, as `multitalk.audio.load_speech` gives them.

    `frames` defaults to as many as the recording fills.
    """
    samples = np.asarray(speech, dtype=np.float64)
    count = int(len(samples) / SAMPLE_RATE * FPS) if frames is None else frames
    hop = SAMPLE_RATE // FPS
    padded = np.pad(samples, (WINDOW // 2, WINDOW + max(0, count * hop - len(samples))))
    starts = hop // 2 + hop * np.arange(count)
    pieces = padded[starts[:, None] + np.arange(WINDOW)]  # [frames, window], each around the frame's middle
    hann = np.hanning(WINDOW)
    # mean power of the windowed samples, by Parseval
    power = 2 * np.abs(np.fft.rfft(pieces * hann, axis=1)) ** 2 / (WINDOW * np.sum(hann**2))
    hertz = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)

    def band(low: float, high: float) -> NDArray[np.float64]:
        level: NDArray[np.float64] = 10 * np.log10(power[:, (hertz >= low) & (hertz < high)].sum(1) + 1e-10)
        return level

    level = band(150, 4000)
    quiet = max(QUIET, float(np.percentile(level, 5)) + 6) if count else QUIET
    opening = _smooth(np.clip((level - quiet) / max(LOUD - quiet, 6), 0, 1))
    width = np.clip((band(1200, 3200) - band(250, 900) + 25) / 25, 0, 1)
    width = 0.5 + (_smooth(_smooth(width)) - 0.5) * np.minimum(1, 4 * opening)
    return Mouth(opening.astype(np.float32), width.astype(np.float32))


def _smooth(x: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(x) < 2:
        return x
    around = np.pad(x, 1, mode="edge")
    return (around[:-2] + 2 * around[1:-1] + around[2:]) / 4
