"""Which failures of the store pass, and when to try again."""

from collections.abc import Iterator

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""First and longest wait, in seconds, before a failed store is tried again; the wait doubles."""
STORE_FAILURES = (OperationalError, InterfaceError, PoolTimeout)
"""Errors of a database that may work again later."""


def waits() -> Iterator[float]:
    """Seconds to wait before each new attempt at what failed, without end."""
    wait = FIRST_WAIT
    while True:
        yield wait
        wait = min(2 * wait, LONGEST_WAIT)
