"""Which failures of the store pass, and when to try again; the same for a full disk."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ..disk_errors import is_disk_full
from ..runner import JobFailed

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""First and longest wait, in seconds, before a failed store is tried again; the wait doubles."""
STORE_FAILURES = (OperationalError, InterfaceError, PoolTimeout)
"""Errors of a database that may work again later."""

log = logging.getLogger("sparsectrl_lcm.service")


def waits() -> Iterator[float]:
    """Seconds to wait before each new attempt at what failed, without end."""
    wait = FIRST_WAIT
    while True:
        yield wait
        wait = min(2 * wait, LONGEST_WAIT)


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
