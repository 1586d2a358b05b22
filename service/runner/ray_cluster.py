"""What the service and `batch` share of Ray: joining a cluster, what a pipeline needs there, why one failed.

Ray is imported only here and in what this is called for.
"""

import logging
import socket
from collections.abc import Mapping
from typing import Any

from ...runtime.errors import BackendError, InvalidRequest, first_line

REACH_SECONDS = 5.0
"""Longest time for a connection to the head of the cluster."""
INSTALL = "pip install 'sparsectrl-lcm[ray]'"
TOKEN = "if the cluster takes tokens, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the one of its head"
"""Ray reads them; by itself it takes the token of ~/.ray/auth_token for the address `auto` only."""


POOLS = ("local", "ray")
RAY_OPTIONS = {"ray_address": "auto", "replicas": "1", "gpus_per_replica": 1.0}
"""The options of `serve` and `batch` that only Ray has, with their defaults."""


def check_pool_options(pool: str, given: Mapping[str, Any]) -> None:
    """Checks the name of a pool and Ray's options before Ray is imported.

    Args:
        pool: the name.
        given: the values of `RAY_OPTIONS`.

    Raises:
        InvalidRequest: one is not allowed, or given for the local pool.
    """
    if pool not in POOLS:
        raise InvalidRequest("pool", f"{pool!r} is not allowed", f"give {' or '.join(POOLS)}")
    check_gpus(given["gpus_per_replica"])
    if pool == "ray":
        return check_address(given["ray_address"])
    for name, default in RAY_OPTIONS.items():
        if str(given[name]) != str(default):
            raise InvalidRequest(name, "only for runners on Ray", "give pool ray, or leave it out")


def check_address(address: str) -> None:
    """Checks an address before Ray is imported.

    Raises:
        InvalidRequest: it is one of Ray's client protocol.
    """
    if address.startswith("ray://"):
        reason = "Ray's client protocol cannot stream progress"
        raise InvalidRequest("ray_address", reason, "let this machine join the cluster (ray start) and give auto")


def check_gpus(gpus: float) -> None:
    """Checks the GPUs of a replica as Ray does, before it is imported.

    Raises:
        InvalidRequest: it is neither a fraction nor a whole number.
    """
    if not (0 <= gpus <= 1 or (gpus > 1 and gpus.is_integer())):
        raise InvalidRequest("gpus_per_replica", f"{gpus:g} is not allowed", "give 0 to 1, or a whole number")


def join_cluster(address: str) -> Any:
    """Makes this process a driver of a cluster, and returns the module `ray`. Blocks.

    Args:
        address: `auto` for the cluster that this machine belongs to, or `HOST:PORT` of its head.

    Raises:
        InvalidRequest: as `check_address`.
        BackendError: Ray is not installed, there is no cluster, or it does not let this process in.
    """
    check_address(address)
    try:
        import ray
    except ImportError:
        raise BackendError("pool", "Ray is not installed", INSTALL) from None
    if ray.is_initialized():
        return ray
    try:
        reached = _reach(address)
    except OSError as error:
        raise _no_cluster(address, error) from None
    try:
        ray.init(address, configure_logging=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ray.exceptions.AuthenticationError) as error:  # ConnectionError among the first
        if not reached and isinstance(error, OSError):
            raise _no_cluster(address, error) from None
        reason = f"{address} did not let this process in ({first_line(error).partition('. ')[0]})"
        raise BackendError("ray_address", reason, TOKEN) from None
    return ray


def needs_of(gpus: float, threads: int | None) -> dict[str, float]:
    """Returns what Ray has to reserve for a pipeline: its GPUs, and a CPU for each thread."""
    return {"num_gpus": gpus, "num_cpus": threads or 0}


def threads_of(gpus: float, threads: int | None) -> int | None:
    """Returns the threads of a pipeline: as given, otherwise one on the CPU, where several share a machine."""
    return threads or (None if gpus else 1)


def reason_in(report: str) -> str:
    """Returns what the last line of a report of Ray says, which may be a traceback's; empty if there is none."""
    lines = report.strip().splitlines()
    return lines[-1].rpartition("Error: ")[2] if lines else ""


def _no_cluster(address: str, error: OSError) -> BackendError:
    reason = f"no Ray cluster at {address} ({first_line(error)})"
    return BackendError("ray_address", reason, "start one: ray start --head")


def _reach(address: str) -> bool:
    """Whether something listens at HOST:PORT; False for `auto`.

    Raises:
        OSError: nothing listens there. Ray itself would wait for minutes.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()):
        return False
    socket.create_connection((host, int(port)), REACH_SECONDS).close()
    return True
