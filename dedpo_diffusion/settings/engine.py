"""Settings of where a stage's work is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RaySettings:
    """The Ray cluster of --engine ray.

    Args:
        address: of the cluster, as "10.0.0.1:6379"; None joins the one that runs on this machine, or starts one here.
        workers: how many work at once; None takes one a GPU, or without GPUs one for each `cpus` cores.
        cpus: cores of each worker.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
