"""Connections to PostgreSQL that give up on a server which no longer answers."""

import math
import time
from typing import Any

import psycopg

from .deadline import Deadline

CONNECT_SECONDS = 5
ANSWER_SECONDS = 10.0
"""Longest wait for the answer to one statement. After a failover no reset may ever come."""
UPGRADE_SECONDS = 600.0
"""The same for an upgrade of the schema, and for the wait until another server has done it."""
IDLE_SECONDS = 60
"""Longest pause within a transaction. The locks of a machine that is gone end with it."""


class BoundedConnection(psycopg.Connection[Any]):
    """Waits at most `bound` seconds for each answer; then it closes, which SQLAlchemy takes for a lost connection."""

    bound = ANSWER_SECONDS
    deadline = Deadline()

    def wait(self, gen: Any, *arguments: Any, **keywords: Any) -> Any:
        """See `psycopg.Connection.wait`, which all blocking methods call."""
        return super().wait(self._bounded(gen, time.monotonic()), *arguments, **keywords)

    def _bounded(self, gen: Any, start: float) -> Any:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                late = time.monotonic() > self.deadline.end(start, self.bound)
                if not ready and late:  # psycopg sends 0 ten times a second while nothing arrives
                    self.close()
                    seconds = time.monotonic() - start
                    raise psycopg.OperationalError(f"the database did not answer for {seconds:.0f} s")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


def connect(arguments: Any, keywords: dict[str, Any], deadline: Deadline) -> BoundedConnection:
    """Connects with bounds on connecting, on silence of the network, and on every statement, also in the database."""
    bounds = {
        "connect_timeout": math.ceil(deadline.left(CONNECT_SECONDS)),
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": int(ANSWER_SECONDS * 1000),
    }
    made = BoundedConnection.connect(*arguments, **(bounds | keywords))
    made.deadline = deadline
    bound_statements(made, made.bound)
    made.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    made.commit()
    return made


def bound_statements(connection: BoundedConnection, seconds: float) -> None:
    """Lets the database end a statement of this connection by itself: it does not notice that nobody waits."""
    connection.bound = seconds
    # a statement, since poolers refuse it as an option of the connection
    connection.execute(f"SET statement_timeout = '{math.ceil(seconds * 1000)}ms'")
