"""Joins a Ray cluster. Ray is imported only here and in what this is called for."""

import logging
import socket
from typing import Any

from ...runtime.errors import BackendError, InvalidRequest, first_line

REACH_SECONDS = 5.0
"""Longest time for a connection to the head of the cluster."""
INSTALL = "pip install 'sparsectrl-lcm[ray]'"


def check_address(address: str) -> None:
    """Checks an address before Ray is imported.

    Raises:
        InvalidRequest: it is one of Ray's client protocol.
    """
    if address.startswith("ray://"):
        reason = "Ray's client protocol cannot stream progress"
        raise InvalidRequest("ray_address", reason, "let this machine join the cluster (ray start) and give auto")


def join_cluster(address: str) -> Any:
    """Makes this process a driver of a cluster, and returns the module `ray`. Blocks.

    Args:
        address: `auto` for the cluster that this machine belongs to, or `HOST:PORT` of its head.

    Raises:
        InvalidRequest: as `check_address`.
        BackendError: Ray is not installed, or there is no cluster.
    """
    check_address(address)
    try:
        import ray
    except ImportError:
        raise BackendError("pool", "Ray is not installed", INSTALL) from None
    if not ray.is_initialized():
        try:
            _reach(address)
            ray.init(address, configure_logging=False, log_to_driver=False, logging_level=logging.ERROR)
        except OSError as error:  # ConnectionError among them
            reason = f"no Ray cluster at {address} ({first_line(error)})"
            raise BackendError("ray_address", reason, "start one: ray start --head") from None
    return ray


def _reach(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
