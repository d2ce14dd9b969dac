"""A service on the random tiny models: its own settings, and an image and a recording that clients send."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.service.folder import ServiceFolder, new_id
from wanvideo_infinitetalk.service.queue import Queue
from wanvideo_infinitetalk.service.worker import examined
from wanvideo_infinitetalk.service.workers import Workers

FRAMES, WINDOWS = 17, 3
SETTINGS = {"width": 32, "height": 32, "frames": 9, "motion_frames": 5, "steps": 1, "max_frames": FRAMES}
"""Of a job of half a second, of three windows."""

NO_WORKERS = SimpleNamespace(devices=["cpu"], alive=1, restarts=0, examine=lambda: examined("cpu"))
"""What an API knows of workers, where none are."""


def base_of(tiny: TinySet) -> dict[str, Any]:
    return {"files": tiny.model_files, "device": "cpu"}


def write_inputs(folder: Path) -> dict[str, Path]:
    """ "image" and "audio" -> a file in `folder`."""
    rng = np.random.default_rng(0)
    image, audio = folder / "image.png", folder / "speech.wav"
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(image)
    t = np.arange(16000) / 16000
    soundfile.write(audio, 0.3 * np.sin(2 * np.pi * (100 + 300 * t) * t), 16000)
    return {"image": image, "audio": audio}


def upload(folder: ServiceFolder, inputs: dict[str, Path], client: str = "local") -> dict[str, Any]:
    """A request of these files, which lie where uploads do."""
    ids = {kind: new_id() for kind in inputs}
    for kind, path in inputs.items():
        sent = folder.upload(client, kind, ids[kind])
        sent.parent.mkdir(parents=True, exist_ok=True)
        sent.write_bytes(path.read_bytes())
    return SETTINGS | {"image": ids["image"], "audio": [ids["audio"]]}


def wait_until(reached: Any, seconds: float = 120) -> None:
    """Returns when `reached()` is true."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.02)


def ended(queue: Queue) -> bool:
    counts = queue.counts()
    return not counts["queued"] + counts["running"]


if __name__ == "__main__":
    # A service without an API, until it is killed: FOLDER, folder of the models, retries, address of a Ray cluster.
    place, base, retries = ServiceFolder.make(sys.argv[1]), base_of(TinySet.in_folder(sys.argv[2])), int(sys.argv[3])
    workers: Any
    if len(sys.argv) > 4:
        from wanvideo_infinitetalk.service.cluster import ClusterWorkers

        workers = ClusterWorkers(place, base, sys.argv[4], device="cpu", gpus=1, retries=retries)
    else:
        workers = Workers(place, base, ["cpu"], retries=retries)
    with workers:
        time.sleep(3600)
