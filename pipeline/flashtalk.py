"""SoulX-FlashTalk: InfiniteTalk distilled to four steps and windows of 33 frames, for streams.

Its network, plan and loop are InfiniteTalk's; its row of `plan.MODES` and its scheduler `flashtalk` say what differs.
What is its own stands here: how speech becomes the rows of a window. As it streams, a window is given what was spoken
in the 8 s before its end, and nothing that comes later; whole recordings may be encoded at once instead.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..media.audio import normalize_loudness
from ..multitalk.wav2vec import SAMPLE_RATE, Wav2Vec2Features
from .plan import RING_FRAMES
from .windows import AUDIO_CONTEXT, Window

__all__ = ["SAMPLES_A_FRAME", "SpeechRing", "SpeechRows", "with_silence_around"]

SAMPLES_A_FRAME = SAMPLE_RATE // 25
"""16 kHz samples that a video frame lasts."""


class SpeechRing:
    """Features of a window's speech from the `RING_FRAMES` frames before its end, silence where nothing was spoken.

    Loudness, mean and variance are those of these 8 s alone, and all of them are encoded for every window: the first
    layer of wav2vec2 is normalized over its whole input, so that no row of it is that of the window before.

    Args:
        encoder: kept, since speech is encoded when its window comes.
        speech: 16 kHz samples [n] that are there already, as loud as they are.

    Attributes:
        shape: (layers, hidden) of a row of features.
        received: samples so far.
    """

    def __init__(self, encoder: Wav2Vec2Features, speech: NDArray[np.float32] | None = None) -> None:
        self.encoder = encoder
        self.shape = (encoder.layers, encoder.hidden_size)
        self._samples = np.zeros(0, np.float32) if speech is None else speech
        self._begin = 0  # sample of the recording that is the first of them

    @property
    def received(self) -> int:
        return self._begin + len(self._samples)

    def append(self, speech: NDArray[np.float32]) -> None:
        """Speech goes on with these 16 kHz samples [n]."""
        self._samples = np.concatenate([self._samples, speech])

    def end(self, frames: int) -> None:
        """There is no speech behind so many video frames."""
        self._samples = self._samples[: max(0, frames * SAMPLES_A_FRAME - self._begin)]

    def __call__(self, window: Window) -> Tensor:
        """[1, frames, 5, layers, hidden]; windows are asked for in their order, each once."""
        features = self.encoder(normalize_loudness(self._before(window.end)), RING_FRAMES)
        return _around(features, RING_FRAMES - window.frames, window.frames)

    def _before(self, frame: int) -> NDArray[np.float32]:
        """The 8 s of speech before a video frame; what is older is dropped."""
        ring = np.zeros(RING_FRAMES * SAMPLES_A_FRAME, np.float32)
        begin = frame * SAMPLES_A_FRAME - len(ring)
        if begin > self._begin:
            self._samples, self._begin = self._samples[begin - self._begin :], begin
        there = self._samples[: frame * SAMPLES_A_FRAME - self._begin]
        at = self._begin - begin
        ring[at : at + len(there)] = there
        return ring


class SpeechRows:
    """Features of a window's speech from those of the whole recording.

    Args:
        features: [rows, layers, hidden]; row r is that of video frame r - `lead`. The first and the last go on.

    Attributes:
        shape: (layers, hidden) of a row.
    """

    def __init__(self, features: Tensor, lead: int) -> None:
        self.features, self.lead = features, lead
        self.shape = (int(features.shape[1]), int(features.shape[2]))

    def __call__(self, window: Window) -> Tensor:
        """[1, frames, 5, layers, hidden]"""
        return _around(self.features, window.start + self.lead, window.frames)


def with_silence_around(speech: NDArray[np.float32], lead: int, end: int) -> NDArray[np.float32]:
    """16 kHz speech [n] behind `lead` frames of silence, cut or with silence behind it until video frame `end`."""
    speech = speech[: end * SAMPLES_A_FRAME]
    return np.pad(speech, (lead * SAMPLES_A_FRAME, end * SAMPLES_A_FRAME - len(speech)))


def _around(features: Tensor, first: int, frames: int) -> Tensor:
    """Rows around each of `frames` frames, [1, frames, 5, layers, hidden], of which the first is row `first`."""
    side = AUDIO_CONTEXT // 2
    rows = torch.arange(first, first + frames)[:, None] + torch.arange(-side, side + 1)
    return features[rows.clamp(0, len(features) - 1)][None]
