"""Whether the database works: an outage begins with a call that fails, and ends with a probe that succeeds."""

import asyncio
import logging
import time

from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ...runtime.errors import first_line


class StoreUnavailable(SQLAlchemyError):
    """The database did not answer in time, or it is known to be out."""


STORE_FAILURES = (OperationalError, InterfaceError, InternalError, PoolTimeout, StoreUnavailable)
"""Errors of a database that may work again later."""

log = logging.getLogger("sparsectrl_lcm.service")


class Outage:
    """Whether the database is out now. Beginning and end are one line each in the log, and belong to the event loop.

    Attributes:
        begun: set at the beginning, for the task that probes.
        works_since: when the last one ended, or this process began, as `time.monotonic`.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._since: float | None = None
        self.works_since = time.monotonic()
        self._reads_fail = False

    @property
    def problem(self) -> str | None:
        """What does not work, without names of hosts or files; None if the database works."""
        if self._since is None:
            return None
        return "the database does not answer" if self._reads_fail else "the database cannot be written"

    def refuse(self, *, reads: bool) -> None:
        """Raises StoreUnavailable during an outage. `reads`: only if the database cannot be read either."""
        if self.problem is not None and (self._reads_fail or not reads):
            raise StoreUnavailable(self.problem)

    def begin(self, error: Exception, call_at: float, *, reads: bool) -> None:
        """Begins the outage after a failed call, unless it has begun already.

        Args:
            error: the failure.
            call_at: when the call began; one from before the end of the last outage says nothing new.
            reads: whether the call was to read.
        """
        if call_at < self.works_since:
            return
        self._reads_fail = self._reads_fail or reads
        if self._since is None:
            self._since = time.monotonic()
            self.begun.set()
            log.error("the database failed: %s", first_line(getattr(error, "orig", None) or error))

    def reads_work(self) -> None:
        """Lets reads through again."""
        self._reads_fail = False

    def end(self) -> None:
        """Ends the outage if there is one."""
        if self._since is not None:
            log.warning("the database works again", extra={"seconds": round(time.monotonic() - self._since, 1)})
            self._since, self.works_since = None, time.monotonic()
