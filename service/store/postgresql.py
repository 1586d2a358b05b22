"""Connections to PostgreSQL that give up on a server which no longer answers."""

import time
from typing import Any

import psycopg

CONNECT_SECONDS = 5
ANSWER_SECONDS = 10.0
"""Longest wait for the answer to one statement. After a failover no reset may ever come."""
UPGRADE_SECONDS = 600.0
"""The same for an upgrade of the schema, and for the wait until another server has done it."""


class BoundedConnection(psycopg.Connection[Any]):
    """Waits at most `bound` seconds for each answer; then it closes, which SQLAlchemy takes for a lost connection."""

    bound = ANSWER_SECONDS

    def wait(self, gen: Any, *arguments: Any, **keywords: Any) -> Any:
        """See `psycopg.Connection.wait`, which all blocking methods call."""
        return super().wait(self._until(gen, time.monotonic() + self.bound), *arguments, **keywords)

    def _until(self, gen: Any, end: float) -> Any:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > end:  # psycopg sends 0 ten times a second while nothing arrives
                    self.close()
                    raise psycopg.OperationalError(f"the database did not answer for {self.bound:g} s")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


def connect(arguments: Any, keywords: dict[str, Any]) -> BoundedConnection:
    """Connects with bounds on connecting, on silence of the network, and on every statement."""
    bounds = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": int(ANSWER_SECONDS * 1000),
    }
    return BoundedConnection.connect(*arguments, **(bounds | keywords))
