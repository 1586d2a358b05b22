"""A database with SQLAlchemy: SQLite for one server, PostgreSQL for several."""

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar
from typing import cast as as_type

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    ExceptionContext,
    Float,
    bindparam,
    cast,
    create_engine,
    delete,
    event,
    extract,
    func,
    insert,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from ...runtime.errors import InvalidRequest, first_line
from . import sqlite, tables
from .deadline import Deadline
from .outage import STORE_FAILURES, Outage, StoreUnavailable
from .schema import upgrade

T = TypeVar("T")
THREADS = 4
"""How many threads read for the event loop. As many others write, or one if SQLite does: reads never wait for them."""
CALL_SECONDS = 15.0
"""Longest wait of the event loop for a call, with the wait for a thread."""
LOCKED_SECONDS = 2.0
"""Longest wait for SQLite's lock if another process writes."""
WRITE_PROBE_SECONDS = 10.0
"""How often a database that seems to work is written for a trial."""


class Database:
    """Connections, transactions, and the threads for calls of the event loop.

    Args:
        url: SQLAlchemy URL. One server at a time may use SQLite, several may share PostgreSQL.

    Raises:
        InvalidRequest: the URL is invalid or of another kind, its driver is not installed, or as `schema.upgrade`.
        SQLAlchemyError: the database cannot be reached or written.

    Attributes:
        outage: whether the database is out now.
        deadline: set while the server ends: calls then take no longer.
    """

    def __init__(self, url: str) -> None:
        self.deadline = Deadline()
        self.engine = _engine(url, self.deadline)
        self.shared = self.engine.dialect.name != "sqlite"
        self._writer = threading.Lock()  # SQLite allows one writer; threads wait here instead of polling
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(THREADS if self.shared else 1, thread_name_prefix="store-write")
        self.outage = Outage()
        self._write_probe_at = 0.0
        with self._write() as connection:
            if not self.shared:
                upgrade(connection)
                return
            from . import postgresql

            bounded: Any = connection.connection.driver_connection
            usual = bounded.bound
            postgresql.bound_statements(bounded, postgresql.UPGRADE_SECONDS)
            connection.execute(select(func.pg_advisory_xact_lock(7_360_114)))  # servers may start together
            upgrade(connection)
            postgresql.bound_statements(bounded, usual)

    def close(self) -> None:
        """Ends threads and connections. Calls that have not begun are cancelled."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        self.engine.dispose()

    async def read(self, method: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Runs a method that only reads in a thread, for callers on the event loop.

        Raises:
            StoreUnavailable: there was no answer for `CALL_SECONDS`, or the database is known to be out. In the first
                case the method may still do its work.
        """
        return await self._unless_out(self._readers, partial(method, *arguments, **keywords))

    async def write(self, method: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Runs a method that writes, as `read` does."""
        return await self._unless_out(self._writers, partial(method, *arguments, **keywords))

    async def probe(self) -> bool:
        """Returns whether the database works. Begins an outage if it does not, and ends one if it does."""
        with suppress(*STORE_FAILURES):
            await self._call(self._readers, self._try_read)
            self.outage.reads_work()
            if self.outage.problem or time.monotonic() > self._write_probe_at:
                await self._call(self._writers, self._try_write)
                self._write_probe_at = time.monotonic() + WRITE_PROBE_SECONDS
            self.outage.end()
        return self.outage.problem is None

    async def _unless_out(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        reads = threads is self._readers

        def checked() -> T:
            self.outage.refuse(reads=reads)  # it may have begun while this call waited for the thread
            return call()

        self.outage.refuse(reads=reads)
        return await self._call(threads, checked)

    async def _call(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        run, begun_at = asyncio.get_running_loop().run_in_executor, time.monotonic()
        try:
            async with asyncio.timeout(
                self.deadline.left(CALL_SECONDS)
            ):  # `wait_for` may lose a cancellation: a drain would never end
                return await run(threads, call)
        except (TimeoutError, *STORE_FAILURES) as failure:
            error = failure
            if isinstance(failure, TimeoutError):
                error = StoreUnavailable(f"the database did not answer for {CALL_SECONDS:g} s")
            self.outage.begin(error, begun_at, reads=threads is self._readers)
            raise error from None

    def _try_read(self) -> None:
        with self._read() as connection:
            connection.execute(select(1))

    def _try_write(self) -> None:
        """Writes to disk, and leaves nothing."""
        name = f"probe {token_hex(16)}"  # a new one, so that no other transaction can hold its lock
        with self._write() as connection:
            connection.execute(insert(tables.secrets).values(name=name, value=""))
            connection.execute(delete(tables.secrets).where(tables.secrets.c.name == name))

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
        try:
            with closing(self.engine.raw_connection()) as pooled:
                yield as_type(sqlite3.Connection, pooled.driver_connection)
        except sqlite3.DatabaseError as error:
            raise OperationalError(None, None, error) from None

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
        return bindparam("clock", callable_=time.time, type_=Float(53))

    def _alone(self, connection: Connection, name: str) -> None:
        """Locks this name against other writers until the transaction ends. SQLite has only one writer anyway.

        The lock comes before those of rows: two writers that each hold rows of the other would wait for ever.
        """
        if self.shared:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def _engine(url: str, deadline: Deadline) -> Engine:
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
        event.listen(
            engine, "do_connect", lambda _dialect, _record, given, named: postgresql.connect(given, named, deadline)
        )
        return engine
    if parsed.database and parsed.database != ":memory:":
        _make_private(Path(parsed.database))
    engine = create_engine(parsed, connect_args={"timeout": LOCKED_SECONDS, "check_same_thread": False}, pool_size=8)

    event.listen(engine, "connect", lambda connection, _: sqlite.prepare(connection))
    event.listen(engine, "handle_error", _name_damage)

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        reads_only = connection.get_execution_options().get("reads_only")
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")

    return engine


def _name_damage(context: ExceptionContext) -> None:
    """Raises an OperationalError for a damaged file: SQLite's driver has no class of its own for it."""
    error = context.original_exception
    if type(error) is sqlite3.DatabaseError:
        raise OperationalError(context.statement, None, error) from error


def _make_private(path: Path) -> None:
    """Creates the file as an empty database that only its owner can read. SQLite's logs get the same permissions."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
