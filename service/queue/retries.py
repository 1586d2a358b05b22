"""Repeats what failed because the database or the object store is out, or the disk is full."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from ...runtime.disk_errors import is_disk_full
from ...runtime.errors import first_line
from ..objects.object_stores import FilesUnavailable
from ..protocol.errors import ServiceError
from ..runner import JobFailed
from ..store import STORE_FAILURES

T = TypeVar("T")
Attempt = Callable[[], Awaitable[T]]
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""First and longest wait, in seconds, before what failed is tried again; the wait doubles."""
LONGEST_STORE_WAIT = 1.0
"""The longest wait for the database, which is not even asked while it is known to be out."""

log = logging.getLogger("sparsectrl_lcm.service")


async def until_the_store_works(attempt: Attempt[T]) -> T:
    """Repeats an attempt until the store does not fail, and returns its result."""
    return await _repeat(attempt, lambda error: isinstance(error, STORE_FAILURES), longest_wait=LONGEST_STORE_WAIT)


async def until_files_work(attempt: Attempt[T], request_id: str) -> T:
    """Repeats an attempt as long as the disk is full or the object store fails, and returns its result."""

    def disk_is_full(error: Exception) -> bool:
        if isinstance(error, JobFailed):
            return error.kind == "disk_full"
        return isinstance(error, OSError) and is_disk_full(error)

    def files_fail(error: Exception) -> bool:
        return disk_is_full(error) or isinstance(error, FilesUnavailable)

    def tell(error: Exception, wait: float) -> None:
        extra = {"request_id": request_id, "seconds": wait}
        reason = "the disk has no room" if disk_is_full(error) else f"the object store failed ({first_line(error)})"
        log.warning("%s for a request, which is tried again", reason, extra=extra)

    return await _repeat(attempt, files_fail, tell)


async def until_it_is_stored(attempt: Attempt[T], clip: Path, request_id: str) -> T:
    """Repeats an attempt to store a clip while the object store fails or is full, and returns its result."""

    def can_be_stored(error: Exception) -> bool:
        return isinstance(error, OSError | ServiceError) and clip.exists()

    def tell(error: Exception, wait: float) -> None:
        extra = {"request_id": request_id, "seconds": wait}
        log.warning("a clip could not be stored, and is tried again: %s", first_line(error), extra=extra)

    return await _repeat(attempt, can_be_stored, tell)


async def _repeat(
    attempt: Attempt[T],
    is_transient: Callable[[Exception], bool],
    tell: Callable[[Exception, float], None] = lambda *_: None,
    longest_wait: float = LONGEST_WAIT,
) -> T:
    """Repeats an attempt while it fails with a transient error, and returns its result.

    Args:
        attempt: what may fail.
        is_transient: whether another attempt may succeed after an error; other errors are raised.
        tell: called with the error and the seconds until the next attempt.
        longest_wait: seconds; the wait doubles up to it.
    """
    wait = FIRST_WAIT
    while True:
        try:
            return await attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            tell(error, wait)
        await asyncio.sleep(wait)
        wait = min(2 * wait, longest_wait)
