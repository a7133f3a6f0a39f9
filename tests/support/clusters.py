"""A Ray cluster on this machine for tests and a benchmark: a head without cores, and nodes with one core each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import psutil

STORE_BYTES = 100 << 20
"""Object store of a node; tasks exchange little data."""


@contextmanager
def local_cluster(nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    """(ray.cluster_utils.Cluster, its nodes without the head); all processes end with the context."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with mock.patch.dict(os.environ, quiet):
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES},
            shutdown_at_exit=True,
        )
        try:
            workers = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(nodes)]
            yield cluster, workers
        finally:
            cluster.shutdown()


def encoders() -> list[psutil.Process]:
    """Descendants of this process that run a task: Ray's are recognised by title, loky's by command line."""
    return [child for child in psutil.Process().children(recursive=True) if _encodes(child)]


def _encodes(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and (
        (words[0].startswith("ray::") and "_call" in words[0]) or any("popen_loky" in word for word in words)
    )


def kill_an_encoder() -> bool:
    """Kill (-9) one worker that runs a task; False if there is none."""
    for process in encoders()[:1]:
        process.kill()
        return True
    return False
