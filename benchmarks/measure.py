"""Is the measure of talking videos right? Its lag against moved sound, its correlation against foreign recordings.

    python -m benchmarks.measure VIDEO ... --recordings WAV ... [--small] [--json F]

The sound of each video is taken to be what its mouth follows. It is moved by -400 to 400 ms in steps of 40, and the
lag that is measured should move with it. Every recording but the video's own is put to it, and should have a low
correlation, although the highest of all shifts counts. Run from the root of the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from wanvideo_infinitetalk.measure.footage import Footage, read_video
from wanvideo_infinitetalk.measure.quantities import FOLLOWS
from wanvideo_infinitetalk.measure.sync import RATE, Curve, correlations, loudness
from wanvideo_infinitetalk.media.audio import load_speech
from wanvideo_infinitetalk.multitalk.wav2vec import SAMPLE_RATE

from .common import Report, parser

MOVED = range(-400, 401, 40)
"""Milliseconds."""

NEAR = 40
"""Milliseconds to which a lag is to be found."""

OWN = 0.6
"""Correlation of two sounds that are the same recording; that of two recordings is far lower."""


def moved(speech: np.ndarray, milliseconds: int) -> np.ndarray:
    """Speech that begins later, with silence before it, or earlier, without what was there."""
    samples = milliseconds * SAMPLE_RATE // 1000
    silence = np.zeros(abs(samples), np.float32)
    return np.concatenate([silence, speech[:-samples]] if samples > 0 else [speech[-samples:], silence])


def curve(footage: Footage, loud: np.ndarray) -> Curve:
    found = correlations(footage.speakers[0].opening, footage.fps, loud)
    assert found is not None, f"{footage.name} or a recording does not move, or lasts less than a second"
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="of one speaker, with sound")
    options.add_argument("--recordings", nargs="+", type=Path, default=[], metavar="WAV", help="foreign ones")
    given = options.parse_args()
    report = Report("measure", "The measure of talking videos", torch.device("cpu"), given.small)
    steps = [0] if given.small else MOVED
    foreign = {path.stem: loudness(load_speech(path)) for path in given.recordings}
    rows, errors, pairs, above = [], [], [], 0
    for path in given.videos:
        footage = read_video(path)
        speech = load_speech(path)

        own = curve(footage, loudness(speech))
        lags = [1000 * curve(footage, loudness(moved(speech, step))).lag for step in steps]
        wrong = [abs(lag - (1000 * own.lag - step)) for lag, step in zip(lags, steps, strict=True)]
        others = []
        for loud in foreign.values():
            same = correlations(loud, RATE, loudness(speech))
            if same is None or same.best < OWN:
                others.append(curve(footage, loud))
        above += sum(one.best > max(FOLLOWS, one.chance) for one in others)
        best = [one.best for one in others]
        errors += wrong
        pairs += best
        rows.append(
            {
                "video": path.stem,
                "faces by": footage.how,
                "correlation": own.best,
                "by chance": own.chance,
                "lag, ms": 1000 * own.lag,
                "moved: worst error, ms": max(wrong),
                "foreign: recordings": len(best),
                "highest": max(best, default=float("nan")),
            }
        )
    report.table("Each video with its own sound, with it moved, and with foreign recordings", rows)
    report.goal("worst error of a lag, ms", max(errors), NEAR)
    if pairs:
        half, most = np.percentile(pairs, [50, 95])
        print(f"\n{len(pairs)} foreign pairs: median {half:.3f}, {above} would be taken to follow")
        report.goal("95th percentile of the correlation with foreign recordings", float(most), FOLLOWS)
    return report.finish(given.json)


if __name__ == "__main__":
    sys.exit(main())
