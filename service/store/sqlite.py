"""Connections to SQLite, and the disk space that its file takes.

By default the file never shrinks. With `auto_vacuum=INCREMENTAL` unused pages can be cut off in small steps.
"""

import logging
import shutil
import sqlite3
from pathlib import Path

from ...runtime.errors import first_line

JOURNAL_BYTES = 16 * 2**20
"""The write-ahead log is cut to this size once all of it is in the database."""
STEP_PAGES = 1000
"""Pages that one step gives back, while writers wait. As many unused pages stay for the next requests."""

log = logging.getLogger("sparsectrl_lcm.service")


def prepare(connection: sqlite3.Connection) -> None:
    """Sets a new connection up."""
    connection.isolation_level = None  # the driver must not begin transactions itself
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # first: the next one writes the header of a new database
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # an acknowledged write survives a power failure
    connection.execute(f"PRAGMA journal_size_limit={JOURNAL_BYTES}")


def unused_bytes(connection: sqlite3.Connection) -> int:
    """Returns the size of the pages that hold nothing. New rows take them before the file grows."""
    return _value(connection, "freelist_count") * _value(connection, "page_size")


def shrink(connection: sqlite3.Connection) -> bool:
    """Gives some unused pages back to the disk. Returns whether there are more to give back."""
    if _value(connection, "auto_vacuum") == 0:
        return False
    spare = _value(connection, "freelist_count") - STEP_PAGES
    if spare <= 0:
        return False
    connection.executescript(f"PRAGMA incremental_vacuum({min(spare, STEP_PAGES)})")  # `execute` stops after one page
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # cuts the file
    return spare > STEP_PAGES


def make_shrinkable(connection: sqlite3.Connection, path: Path) -> None:
    """Rewrites a database of an earlier version, whose file cannot shrink, unless the disk is too full for it."""
    if _value(connection, "auto_vacuum") != 0:
        return
    size = (_value(connection, "page_count") - _value(connection, "freelist_count")) * _value(connection, "page_size")
    needed = 2 * size + JOURNAL_BYTES  # a copy, and the same pages in the write-ahead log
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(f"{needed} bytes of free disk space are needed")
        log.info("the database is rewritten once, so that its file can shrink", extra={"bytes": size})
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except (OSError, sqlite3.Error) as error:
        log.warning("the database's file cannot shrink before the next start: %s", first_line(error))


def _value(connection: sqlite3.Connection, pragma: str) -> int:
    value: int = connection.execute(f"PRAGMA {pragma}").fetchone()[0]
    return value
