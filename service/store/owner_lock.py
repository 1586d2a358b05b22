"""A lock in a shared database for the name under which a server claims requests: a copied data folder has the same."""

import logging
import time
from contextlib import suppress

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DBAPIError

START_SECONDS = 20.0
"""How long a start waits for the lock: longer than PostgreSQL takes to notice that the session's machine is gone."""
TCP = {"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "2"}
"""PostgreSQL's settings that make it do so within 15 seconds."""

log = logging.getLogger("sparsectrl_lcm.service")


class OwnerLock:
    """Belongs to a session of its own, outside the pool, and is lost with it. SQLite needs none. Blocks.

    Args:
        engine: leads to the database.
        owner: the name of the server.

    Attributes:
        owner: the name of the server.
        problem: why this server must claim nothing now, in one line; None as long as it has the lock.
    """

    def __init__(self, engine: Engine, owner: str) -> None:
        self.problem: str | None = None
        self._engine = engine
        self.owner = owner
        self._needed = engine.dialect.name != "sqlite"
        self._key = func.hashtextextended(f"server {owner}", 0)
        self._session: Connection | None = None

    def take(self) -> bool:
        """Takes the lock, for which it waits a while. Returns whether it has it.

        Raises:
            DBAPIError: the database cannot be reached.
        """
        if self._has_or_takes():
            return True
        log.warning("the database has a session of this server or of a copy; waiting %g s for its end", START_SECONDS)
        end = time.monotonic() + START_SECONDS
        while not (taken := self._has_or_takes()) and time.monotonic() < end:
            time.sleep(0.1)
        return taken

    def check(self) -> None:
        """Notes whether this server still has the lock. Takes it again if its session was lost.

        Raises:
            DBAPIError: the database cannot be reached.
        """
        has = self._has_or_takes()
        if not has and self.problem is None:
            self.problem = (
                "the database has a session of a server with a copy of this data folder, or one that was lost"
            )
            log.error("%s: this server begins no request until that session ends", self.problem)
        elif has and self.problem is not None:
            self.problem = None
            log.warning("the other session of this data folder has ended: this server goes on")

    def close(self) -> None:
        """Releases the lock, and ends the session, whose end the database may notice only later."""
        if self._session is not None:
            with suppress(DBAPIError):
                self._session.execute(select(func.pg_advisory_unlock(self._key)))
        self._end_session()

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _has_or_takes(self) -> bool:
        if not self._needed:
            return True
        if self._session is not None:
            try:
                self._session.execute(select(1))
                return True
            except DBAPIError:
                self._end_session()
        session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            session.detach()
            session.execute(select(*(func.set_config(name, value, False) for name, value in TCP.items())))
            taken = bool(session.execute(select(func.pg_try_advisory_lock(self._key))).scalar_one())
        except BaseException:
            session.close()
            raise
        if taken:
            self._session = session
        else:
            session.close()
        return taken
