"""When to try again what failed because the store is out or the disk is full."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from ...runtime.disk_errors import is_disk_full
from ..runner import JobFailed
from ..store import STORE_FAILURES

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""First and longest wait, in seconds, before what failed is tried again; the wait doubles."""
LONGEST_STORE_WAIT = 1.0
"""The same for the database, which is not even asked while it is known to be out."""

log = logging.getLogger("sparsectrl_lcm.service")


def waits() -> Iterator[float]:
    """Seconds to wait before each new attempt at what failed, without end."""
    wait = FIRST_WAIT
    while True:
        yield wait
        wait = min(2 * wait, LONGEST_WAIT)


async def until_the_store_works(call: Callable[[], Awaitable[T]]) -> T:
    """Awaits a call, again and again until the store does not fail, and returns its result."""
    again = waits()
    while True:
        with suppress(*STORE_FAILURES):
            return await call()
        await asyncio.sleep(min(next(again), LONGEST_STORE_WAIT))


async def until_there_is_room(attempt: Callable[[], Awaitable[T]], request_id: str) -> T:
    """Repeats an attempt as long as the disk is full, and returns its result."""
    again = waits()
    while True:
        try:
            return await attempt()
        except (OSError, JobFailed) as error:
            full = error.kind == "disk_full" if isinstance(error, JobFailed) else is_disk_full(error)
            if not full:
                raise
            wait = next(again)
            extra = {"request_id": request_id, "seconds": wait}
            log.warning("the disk has no room for a request, which is tried again", extra=extra)
        await asyncio.sleep(wait)
