"""Ports for the servers of tests, which stay free until a server starts and while it starts again."""

import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle

FIRST, OF_WORKER, WORKERS = 20_000, 1000, 12
"""Below the ports that systems give to connections and to listeners that name none."""


def _numbers() -> Iterator[int]:
    """The ports of this worker of pytest-xdist, again and again. Other runs on this machine begin elsewhere."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    begin = random.randrange(OF_WORKER)
    return cycle(FIRST + worker * OF_WORKER + (begin + place) % OF_WORKER for place in range(OF_WORKER))


_NUMBERS = _numbers()


def free_ports(count: int) -> list[int]:
    """Returns ports of 127.0.0.1 at which nothing listens."""
    found: list[int] = []
    while len(found) < count:
        port = next(_NUMBERS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found
