"""The version of the database's schema: checked at every start, and brought up to date with Alembic."""

import logging
import threading
from functools import cache
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.exc import SQLAlchemyError

from ...runtime.errors import InvalidRequest, first_line
from . import tables

FOLDER = str(Path(__file__).parent / "migrations")
FIRST = "0001"
"""The schema of databases from before versions were recorded."""
BACKUP = "restore a backup (docs/service.md, Backup and upgrade)"
_one_at_a_time = threading.Lock()  # Alembic's `op` belongs to the process

log = logging.getLogger("sparsectrl_lcm.service")


def upgrade(connection: Connection) -> None:
    """Creates the tables, or brings those of an older version up to date, in the transaction of `connection`.

    Raises:
        InvalidRequest: a newer version wrote the database, its tables are not those of its version, or the upgrade
            failed. The database is unchanged then.
    """
    script = _migrations()
    known = [each.revision for each in script.walk_revisions()]  # newest first

    def steps(revision: Any, _: Any) -> Any:
        return script._upgrade_revs("head", revision)  # what `alembic upgrade head` calls

    with _one_at_a_time, EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection)
        context = environment.get_context()
        before = context.get_current_revision()
        if before is not None and before not in known:
            reason = f"its schema {before[:20]} is newer than {known[0]}, the newest that this version knows"
            raise InvalidRequest("database", reason, "install the version that wrote it, or restore a backup")
        try:
            if before is None and inspect(connection).has_table(tables.requests.name):
                before = FIRST
                context.stamp(script, FIRST)
            environment.run_migrations()
        except SQLAlchemyError as error:
            cause = first_line(getattr(error, "orig", None) or error)
            reason = f"its schema {before or 'of a new database'} cannot be brought to {known[0]} ({cause})"
            raise InvalidRequest("database", reason, BACKUP) from None
    _check(connection)
    if before not in (None, known[0]):
        log.info("the database was upgraded", extra={"from_schema": before, "to_schema": known[0]})


@cache
def _migrations() -> ScriptDirectory:
    return ScriptDirectory(FOLDER, version_locations=[FOLDER])


def _check(connection: Connection) -> None:
    """Raises InvalidRequest if a table or column is missing, for instance after an incomplete restore."""
    found = inspect(connection)
    for table in tables.metadata.sorted_tables:
        if not found.has_table(table.name):
            raise InvalidRequest("database", f"the table {table.name} is missing", BACKUP)
        there = {column["name"] for column in found.get_columns(table.name)}
        if missing := [name for name in table.columns.keys() if name not in there]:  # noqa: SIM118 (names, not columns)
            raise InvalidRequest("database", f"the table {table.name} has no column {missing[0]}", BACKUP)
