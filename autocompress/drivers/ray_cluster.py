"""Starting Ray on this machine or joining a cluster, and leaving it."""

from __future__ import annotations

from autocompress.core.errors import UsageError
from autocompress.core.machine import usable_cores
from autocompress.drivers import environment

environment.prepare()

import ray  # noqa: E402 - reads the environment when it is imported

_STORE_MARGIN = 256 << 20


def start_ray(workers: int, *, address: str | None = None, n_bytes: int = 0) -> bool:
    """Make sure that Ray runs in this process.

    Args:
        workers: CPUs to claim at least, if Ray is started here.
        address: a cluster to join; None starts Ray on this machine.
        n_bytes: what the object store has to hold.

    Returns:
        True if Ray was started or joined now, False if this process had already done so.

    Raises:
        UsageError: there is no cluster at `address`.
    """
    if ray.is_initialized():
        return False
    quiet = {"logging_level": "error", "log_to_driver": False}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"There is no Ray cluster at {address!r}: {last_line(error)} Next step: start "
                "one with `ray start --head`, or leave out --address."
            ) from error
        return True
    ray.init(
        num_cpus=max(workers, usable_cores()),
        include_dashboard=False,
        object_store_memory=n_bytes + n_bytes // 4 + _STORE_MARGIN,
        **quiet,
    )
    return True


def alive_nodes() -> dict[str, dict[str, float]]:
    """Resources of the cluster's nodes by their id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def node_of_driver() -> str | None:
    """Id of the node that this process is on; None if it reaches the cluster from outside."""
    if ray.util.client.ray.is_connected():
        return None
    return str(ray.get_runtime_context().get_node_id())


def stop_ray() -> None:
    """Leave the cluster; end it if this process started it."""
    ray.shutdown()


def last_line(error: Exception) -> str:
    """The end of an error's text: what happened, without where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
