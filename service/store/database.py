"""A database behind SQLAlchemy: SQLite for one server, PostgreSQL for several."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Float,
    cast,
    create_engine,
    event,
    extract,
    func,
    literal,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ...runtime.errors import InvalidRequest, first_line
from . import tables


class Database:
    """Connections and transactions.

    Args:
        url: of SQLAlchemy; SQLite is used by one server at a time, PostgreSQL by several.

    Raises:
        InvalidRequest: of another kind, or its driver is not installed.
        SQLAlchemyError: it cannot be reached or written.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.shared = self.engine.dialect.name != "sqlite"
        self._turn = threading.Lock()  # SQLite has one writer; threads wait here rather than by polling
        with self._write() as connection:
            if self.shared:  # servers that start together make the tables one after the other
                connection.execute(select(func.pg_advisory_xact_lock(7_360_114)))
            tables.metadata.create_all(connection)

    def close(self) -> None:
        """Ends the connections."""
        self.engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        if self.shared:
            with self.engine.begin() as connection:
                yield connection
        else:
            with self._turn, self.engine.begin() as connection:
                yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection.execution_options(reads_only=True)

    def _clock(self) -> ColumnElement[float]:
        """The time that leases are compared with: one for all servers, whatever their own clocks say."""
        if self.shared:
            return cast(extract("epoch", func.clock_timestamp()), Float(53))
        return literal(time.time())

    def _alone(self, connection: Connection, name: str) -> None:
        """Until the end of the transaction no other writes under this name; SQLite has one writer anyway."""
        if self.shared:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def _engine(url: str) -> Engine:
    allowed = "give postgresql://USER@HOST/NAME, or leave it out for SQLite in the data folder"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # its text may hold a password
        raise InvalidRequest(f"database: what was given is no URL; {allowed}") from None
    kind = parsed.get_backend_name()
    if kind not in ("postgresql", "sqlite"):
        raise InvalidRequest(f"database: {kind}:// is not supported; {allowed}")
    if kind == "postgresql":
        try:
            return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=8)
        except ImportError as error:
            reason = first_line(error)
            mend = "pip install 'sparsectrl-lcm[service,postgresql]'"
            raise InvalidRequest(f"database: postgresql:// needs psycopg ({reason}); run: {mend}") from None
    if parsed.database and parsed.database != ":memory:":
        _make_private(Path(parsed.database))
    engine = create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False}, pool_size=8)

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # what was answered survives a loss of power

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        reads_only = connection.get_execution_options().get("reads_only")
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")

    return engine


def _make_private(path: Path) -> None:
    """An empty file is an empty database; SQLite gives its logs the permissions of the file."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
