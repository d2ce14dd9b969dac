"""Peak resident memory of a whole generation, for a short and a long recording.

    python -m benchmarks.memory                  10 s and 60 s of speech
    python -m benchmarks.memory --seconds 10 600 --limit 1.1

Each run is a process of its own with the tiny models, from files to a video file. Memory must not grow with the length
of the recording: the ratio of the longest run to the shortest is printed, and the exit status is 1 when it is above the
limit. Run from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

CHILD = "--child"

STEADY = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "OMP_NUM_THREADS": "1"}
"""Environment of a run. By default glibc keeps freed blocks by a threshold that moves with chance: the same run then
peaks anywhere within 15 %."""


def measure(seconds: float, folder: Path) -> int:
    """Peak resident memory in bytes of a process that makes a video of `seconds`; its models are made in `folder`."""
    command = [sys.executable, str(Path(__file__).resolve()), CHILD, str(seconds), str(folder)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | STEADY).stdout
    return int(json.loads(answer.splitlines()[-1])["peak"])


def run_child(seconds: float, folder: Path) -> None:
    """Make one video and print the peak of this process."""
    import resource

    import numpy as np
    import soundfile
    from wanvideo_infinitetalk.cli.demo import demo_job
    from wanvideo_infinitetalk.pipeline.make_video import make_video

    with demo_job(folder / f"{seconds:g}s.mp4", models=folder, attention_mode="sdpa", device="cpu") as job:
        wave, rate = soundfile.read(job.audio[0], dtype="float32")
        recording = folder / f"{seconds:g}s.wav"
        soundfile.write(recording, np.resize(wave, round(seconds * rate)), rate)
        config = replace(job.config, steps=1, cfg=1.0, audio_cfg=1.0)
        result = make_video(replace(job, audio=(recording,), config=config))
    assert abs(result.frames / 25 - seconds) <= 1 / 25, f"{result.frames} frames for {seconds} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": peak * (1 if sys.platform == "darwin" else 1024)}))  # kilobytes but on macOS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60], help="lengths of the recordings")
    parser.add_argument("--limit", type=float, default=1.1, help="largest ratio of the longest run to the shortest")
    arguments = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for seconds in sorted(arguments.seconds):
            peaks[seconds] = measure(seconds, Path(folder))
            print(f"{seconds:6g} s of speech: peak {peaks[seconds] / 2**20:7.1f} MiB", flush=True)
    ratio = peaks[max(peaks)] / peaks[min(peaks)]
    print(f"ratio {ratio:.3f} (limit {arguments.limit:g})")
    return 0 if ratio <= arguments.limit else 1


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        run_child(float(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
