"""How many CPUs each Ray worker gets, and where workers run: numbers only, no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autocompress.core.errors import UsageError

Nodes = Mapping[str, Mapping[str, float]]
"""Resources of each alive node (``CPU``, ``GPU``; what is missing is 0) by its id."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What a worker reserves, and where.

    Attributes:
        cpus: that each worker reserves.
        node: id of the node that all workers are kept to; None if they run anywhere.
    """

    cpus: int
    node: str | None


def place_workers(
    nodes: Nodes, *, workers: int, gpus: float, here: str | None, may_grow: bool
) -> Placement:
    """The most CPUs per worker at which as many workers run as can.

    Workers are kept to the node of the driver, whose files they may then read, if it is the only
    one and no worker waits for others to join.

    Args:
        nodes: the cluster's.
        workers: that are wanted; those that do not fit now wait for nodes that join.
        gpus: that each worker reserves; a fraction lets workers share one.
        here: id of the driver's node; None if it is on none.
        may_grow: nodes may join later.

    Raises:
        UsageError: no node can hold a worker; or GPUs above 1 are no whole number.
    """
    if gpus > 1 and gpus != int(gpus):
        raise UsageError(
            f"A worker has a fraction of one GPU or whole ones, but got --gpus-per-worker {gpus:g}."
            f" Next step: give {math.floor(gpus)} or {math.ceil(gpus)}."
        )
    n_now = min(workers, _n_that_fit(nodes, 1, gpus))
    if not n_now:
        raise UsageError(_refusal(nodes, gpus))
    most = max(int(node.get("CPU", 0)) for node in nodes.values())
    cpus = max(c for c in range(1, most + 1) if _n_that_fit(nodes, c, gpus) >= n_now)
    stays = set(nodes) == {here} and (n_now == workers or not may_grow)
    return Placement(cpus, here if stays else None)


def _n_that_fit(nodes: Nodes, cpus: int, gpus: float) -> int:
    """Workers of this size that all nodes hold together."""
    return sum(_n_on(node, cpus, gpus) for node in nodes.values())


def _n_on(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    by_cpu = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    n_gpus = int(node.get("GPU", 0))
    # Workers share a GPU, but no worker has parts of two.
    by_gpu = n_gpus * math.floor(1 / gpus + 1e-9) if gpus < 1 else n_gpus // int(gpus)
    return min(by_cpu, by_gpu)


def _refusal(nodes: Nodes, gpus: float) -> str:
    most_gpus = max((node.get("GPU", 0.0) for node in nodes.values()), default=0.0)
    if most_gpus < gpus:
        return (
            f"A worker needs {gpus:g} GPUs, but no node of the Ray cluster has them (most GPUs on "
            f"a node: {most_gpus:g}). Next step: lower --gpus-per-worker, or join another cluster "
            "with --address."
        )
    beside = f" beside its {gpus:g} GPUs" if gpus else ""
    return (
        f"A worker needs 1 CPU{beside}, but none of the {len(nodes)} nodes of the Ray cluster "
        "offers it. Next step: wait for nodes with CPUs to join, or start one with "
        "`ray start --address=... --num-cpus=...`."
    )
