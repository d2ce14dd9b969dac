"""Compute the speech features of the training recordings once, with the trained wav2vec2, for the transformer.

`python -m wanvideo_infinitetalk.tools.demo_model.prepare_sounds RECORDINGS.npz EARS.safetensors SOUNDS.npz`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ...multitalk.wav2vec import Wav2Vec2Features
from .recordings import read_recordings
from .rule import mouth_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("ears", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=None, help="only so many recordings")
    given = parser.parse_args()
    ears = Wav2Vec2Features.load(given.ears)
    features, mouths, ends = [], [], []
    for number, speech in enumerate(read_recordings(given.recordings)[: given.count]):
        ears.do_normalize = number % 2 == 0  # both ways in which the files are read
        rows = ears(speech)
        mouth = mouth_of(speech, len(rows))
        features.append(rows.half())
        mouths.append(np.stack([mouth.opening, mouth.width], axis=1))
        ends.append(len(rows))
    np.savez(given.out, features=torch.cat(features).numpy(), mouth=np.concatenate(mouths), ends=np.cumsum(ends))


if __name__ == "__main__":
    main()
