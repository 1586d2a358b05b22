"""A database with SQLAlchemy: SQLite for one server, PostgreSQL for several."""

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from typing import cast as as_type

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
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ...runtime.errors import InvalidRequest, first_line
from . import sqlite
from .schema import upgrade

T = TypeVar("T")
THREADS = 4
"""How many threads run the calls of the event loop."""
CALL_SECONDS = 15.0
"""Longest wait of the event loop for a call, with the wait for a thread."""


class Database:
    """Connections, transactions, and the threads for calls of the event loop.

    Args:
        url: SQLAlchemy URL. One server at a time may use SQLite, several may share PostgreSQL.

    Raises:
        InvalidRequest: the URL is invalid or of another kind, its driver is not installed, or as `schema.upgrade`.
        SQLAlchemyError: the database cannot be reached or written.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.shared = self.engine.dialect.name != "sqlite"
        self._writer = threading.Lock()  # SQLite allows one writer; threads wait here instead of polling
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        with self._write() as connection:
            if not self.shared:
                upgrade(connection)
                return
            from . import postgresql

            bounded: Any = connection.connection.driver_connection
            usual, bounded.bound = bounded.bound, postgresql.UPGRADE_SECONDS
            connection.execute(select(func.pg_advisory_xact_lock(7_360_114)))  # servers may start together
            upgrade(connection)
            bounded.bound = usual

    def close(self) -> None:
        """Ends threads and connections. Calls that have not begun are cancelled."""
        self._threads.shutdown(cancel_futures=True)
        self.engine.dispose()

    async def call(self, method: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Runs a method of the store in one of its threads, for callers on the event loop.

        Raises:
            sqlalchemy.exc.TimeoutError: there was no answer for `CALL_SECONDS`. The method may still do its work.
        """
        run = asyncio.get_running_loop().run_in_executor
        try:
            async with asyncio.timeout(CALL_SECONDS):  # `wait_for` may lose a cancellation: a drain would never end
                return await run(self._threads, lambda: method(*arguments, **keywords))
        except TimeoutError:
            raise PoolTimeout(f"the database did not answer for {CALL_SECONDS:g} s") from None

    def unused_bytes(self) -> int:
        """Returns how much of SQLite's file holds nothing, and is used before the file grows. 0 for PostgreSQL."""
        with self._sqlite() as connection:
            return 0 if connection is None else sqlite.unused_bytes(connection)

    def shrink(self) -> bool:
        """Gives some of that space back to the disk. Returns whether there is more. PostgreSQL does this by itself."""
        with self._writer, self._sqlite() as connection:
            return connection is not None and sqlite.shrink(connection)

    def make_shrinkable(self) -> None:
        """Rewrites a SQLite database of an earlier version, whose file cannot shrink, if the disk has space for it."""
        with self._writer, self._sqlite() as connection:
            path = self.engine.url.database
            if connection is not None and path and path != ":memory:":
                sqlite.make_shrinkable(connection, Path(path))

    @contextmanager
    def _sqlite(self) -> Iterator[sqlite3.Connection | None]:
        """Yields a connection without a transaction; None if this is PostgreSQL."""
        if self.shared:
            yield None
            return
        pooled = self.engine.raw_connection()
        try:
            yield as_type(sqlite3.Connection, pooled.driver_connection)
        finally:
            pooled.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        if self.shared:
            with self.engine.begin() as connection:
                yield connection
        else:
            with self._writer, self.engine.begin() as connection:
                yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection.execution_options(reads_only=True)

    def _clock(self) -> ColumnElement[float]:
        """Returns the time that leases are compared with. All servers share it, even if their own clocks differ."""
        if self.shared:
            return cast(extract("epoch", func.clock_timestamp()), Float(53))
        return literal(time.time())

    def _alone(self, connection: Connection, name: str) -> None:
        """Locks this name against other writers until the transaction ends. SQLite has only one writer anyway."""
        if self.shared:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def _engine(url: str) -> Engine:
    remedy = "give postgresql://USER@HOST/NAME, or leave it out for SQLite in the data folder"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the error's text may hold a password
        raise InvalidRequest("database", "the value is not a URL", remedy) from None
    kind = parsed.get_backend_name()
    if kind not in ("postgresql", "sqlite"):
        raise InvalidRequest("database", f"{kind}:// is not supported", remedy)
    if kind == "postgresql":
        try:
            engine = create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=8)
            from . import postgresql  # needs psycopg
        except ImportError as error:
            reason = f"postgresql:// needs psycopg ({first_line(error)})"
            install = "run: pip install 'sparsectrl-lcm[service,postgresql]'"
            raise InvalidRequest("database", reason, install) from None
        event.listen(engine, "do_connect", lambda _dialect, _record, given, named: postgresql.connect(given, named))
        return engine
    if parsed.database and parsed.database != ":memory:":
        _make_private(Path(parsed.database))
    engine = create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False}, pool_size=8)

    event.listen(engine, "connect", lambda connection, _: sqlite.prepare(connection))

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        reads_only = connection.get_execution_options().get("reads_only")
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")

    return engine


def _make_private(path: Path) -> None:
    """Creates the file as an empty database that only its owner can read. SQLite's logs get the same permissions."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
