"""Jobs per minute on one and on two nodes of a local Ray cluster, and what the death of a node costs.

    python -m benchmarks.cluster [--jobs 20]

The nodes are processes of this machine, which declare a GPU each and compute on its CPU: they share its cores. The jobs
are half a second long, of the random tiny models. Run from the root of the repository; needs the extra [cluster].
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from wanvideo_infinitetalk import assets
from wanvideo_infinitetalk.cli.tiny_models import make_tiny
from wanvideo_infinitetalk.media.video import VideoFrames
from wanvideo_infinitetalk.service.folder import ServiceFolder, new_id

SETTINGS = {"width": 32, "height": 32, "frames": 9, "motion_frames": 5, "steps": 1, "max_frames": 17}
"""Of a job of three windows."""


def wait_until(reached: Callable[[], bool]) -> None:
    while not reached():
        time.sleep(0.05)


def measure(nodes: int, jobs: int, kill: bool) -> None:
    """Print how long so many jobs take on so many nodes, one of which dies when half are done, if it is to."""
    from ray.cluster_utils import Cluster
    from wanvideo_infinitetalk.service.cluster import ClusterWorkers

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    machines = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(nodes)]
    with tempfile.TemporaryDirectory() as temporary:
        base = {"files": make_tiny(Path(temporary) / "models", random=True).model_files}
        folder = ServiceFolder.make(Path(temporary) / "service")
        image, audio = new_id(), new_id()
        request = {**SETTINGS, "image": image, "audio": [audio]}
        for kind, id, name in (("image", image, "portrait.png"), ("audio", audio, "speech.wav")):
            upload = folder.upload("local", kind, id)
            upload.parent.mkdir(parents=True)
            with as_file(files(assets) / name) as path:
                upload.write_bytes(path.read_bytes())
        queue = folder.queue()
        begin = time.monotonic()
        with ClusterWorkers(folder, base, cluster.address, device="cpu", gpus=1, retries=0) as workers:
            wait_until(lambda: workers.alive == nodes)
            print(f"{nodes} nodes: workers there after {time.monotonic() - begin:.1f} s", flush=True)
            for _ in range(nodes):  # their models are loaded now
                queue.add(new_id(), "local", request)
            wait_until(lambda: queue.counts()["done"] == nodes)
            records = [queue.add(new_id(), "local", request | {"seed": seed}) for seed in range(jobs)]
            begin = time.monotonic()
            if kill:
                wait_until(lambda: queue.counts()["done"] >= nodes + jobs // 2)
                cluster.remove_node(machines[0], allow_graceful=False)
            wait_until(lambda: queue.counts()["done"] + queue.counts()["failed"] == nodes + jobs)
            seconds = time.monotonic() - begin
        after = [queue.get(record.id) for record in records]
        whole = [
            job for job in after if len(VideoFrames(folder.output("local", job.id).video)) == SETTINGS["max_frames"]
        ]
        print(
            f"{nodes} nodes{', one of which died' * kill}: {jobs} jobs in {seconds:.1f} s, {60 * jobs / seconds:.1f} a "
            f"minute; {len(whole)} whole videos, {sum(job.crashes for job in after)} deaths counted",
            flush=True,
        )
        queue.close()
    cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for nodes, kill in ((1, False), (2, False), (2, True)):
        measure(nodes, args.jobs, kill)


if __name__ == "__main__":
    main()
