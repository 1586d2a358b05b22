"""Waiting for what a server, another process or a thread does."""

import time
from collections.abc import Callable

import httpx

SECONDS = 60.0
"""More than any wait of these tests takes, also on a machine that is slow and busy: only what hangs takes longer."""


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS, problem: str = "") -> None:
    """Waits until a condition is true. After `seconds` the test fails with `problem`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, problem
        time.sleep(0.02)


def wait_until_it_is(status: str, client: httpx.Client, url: str) -> None:
    """Waits until a request with this URL is IN_PROGRESS, or COMPLETED, also through an outage of the database."""
    wait_until(lambda: client.get(f"{url}/status").json().get("status") == status)
