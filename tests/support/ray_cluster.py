"""A Ray cluster of processes on this machine: a head without GPUs, and nodes that declare one each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster  # reads the environment


class LocalCluster:
    """Attributes: `address` of the head, `nodes` that live."""

    def __init__(self, nodes: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add()

    def add(self) -> Any:
        self.nodes.append(self._cluster.add_node(num_cpus=1, num_gpus=1))
        return self.nodes[-1]

    def kill(self, id: str) -> None:
        """End all processes of the node of this id at once."""
        node = next(node for node in self.nodes if node.node_id == id)
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        with suppress(Exception):  # what is left of the nodes ends with the process
            self._cluster.shutdown()


@contextmanager
def local_cluster(nodes: int) -> Iterator[LocalCluster]:
    cluster = LocalCluster(nodes)
    try:
        yield cluster
    finally:
        cluster.end()
