"""The version of the schema: databases of older versions keep all they hold, and those of newer ones are refused."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sparsectrl_lcm.runtime.errors import InvalidRequest
from sparsectrl_lcm.service.store import SqlStore, tables
from sqlalchemy import Engine, create_engine, event, inspect, text

SCHEMAS = Path(__file__).parent / "schemas"  # as the servers before recorded versions created them
REQUESTS = 10_000
LATER = {"turn", "idempotency_key", "fingerprint", "input_bytes", "webhooks.key_id", "endpoint", "frames"}
FIRST_COLUMNS = {
    table.name: [name for name in table.columns.keys() if not {name, f"{table.name}.{name}"} & LATER]  # noqa: SIM118
    for table in tables.metadata.sorted_tables
}
"""The columns of each table in the first schema."""


@pytest.fixture(autouse=True)
def _copied_databases() -> None:
    """Databases are created as a server does."""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'a.sqlite3'}"
        return
    server: str = request.getfixturevalue("database")
    name = f"schema_{time.monotonic_ns()}"
    admin = _engine(server).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.replace("/postgres?", f"/{name}?")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def _engine(url: str) -> Engine:
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"))


def _old(url: str, without: str = "") -> None:
    """Creates the database of a server before recorded versions, with data in every table."""
    engine = _engine(url)
    with engine.begin() as connection:
        for statement in (SCHEMAS / f"{engine.dialect.name}.sql").read_text().split(";"):
            if statement.strip():
                kept = [line for line in statement.splitlines() if not without or line.split()[:1] != [without]]
                connection.exec_driver_sql("\n".join(kept))
        if not without:
            for table, rows in _data().items():
                names = ", ".join(rows[0])
                values = ", ".join(f":{name}" for name in rows[0])
                connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), rows)
    engine.dispose()


def _data() -> dict[str, list[dict[str, Any]]]:
    states = ("queued", "done")
    requests = [
        {
            "id": f"r{n}", "key_id": "k", "kind": "queue", "input": json.dumps({"prompt": f"ä {n}"}),
            "state": states[n % 2], "priority": 0, "created_at": float(n), "keep_io": bool(n % 3), "retry": True,
            "base_url": "http://x", "attempts": n % 2, "crashes": 0, "cancelled": False,
            "finished_at": n + 1.0 if n % 2 else None, "status": 200 if n % 2 else None,
            "body": json.dumps({"seed": n}) if n % 2 else None,
        }
        for n in range(REQUESTS)
    ]  # fmt: skip
    return {
        "requests": requests,
        "logs": [{"request_id": "r1", "message": "m", "level": "INFO", "created_at": 1.0, "labels": '{"a":"b"}'}],
        "keys": [{"id": "k", "name": "n", "secret_hash": "h", "created_at": 1.0}],
        "files": [{"id": "f", "key_id": "k", "name": "n", "content_type": "t", "size": 2**40, "object_name": "o",
                   "created_at": 1.0, "expires_at": 5.0}],
        "webhooks": [{"request_id": "r1", "url": "http://h", "host": "h", "attempts": 3, "next_at": 1.0}],
        "secrets": [{"name": "tokens", "value": "ab" * 32}],
    }  # fmt: skip


def _everything(url: str) -> dict[str, list[Any]]:
    engine = _engine(url)
    with engine.connect() as connection:
        found = {
            name: sorted(map(tuple, connection.execute(text(f"SELECT {', '.join(columns)} FROM {name}"))), key=repr)
            for name, columns in FIRST_COLUMNS.items()
        }
    engine.dispose()
    return found


def test_an_upgrade_keeps_everything(empty: str) -> None:
    _old(empty)
    before = _everything(empty)
    assert len(before["requests"]) == REQUESTS
    statements: list[str] = []
    note = partial(_note, statements)
    event.listen(Engine, "before_cursor_execute", note)
    try:
        store = SqlStore(empty)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    try:
        assert _everything(empty) == before
        assert len(statements) < REQUESTS / 10, "an upgrade takes no statement for each request"
        with store.engine.connect() as connection:
            size = connection.execute(text("SELECT input_bytes FROM requests WHERE id = 'r2'")).scalar_one()
        assert size == len('{"prompt": "\\u00e4 2"}')
        assert store.given("r2") == ({"prompt": "ä 2"}, "http://x")
        assert store.secret("tokens") == b"\xab" * 32
        row = store.get("r1")
        assert row is not None and row.outcome is not None and row.outcome.body == {"seed": 1}
        indexes = {index["name"] for index in inspect(store.engine).get_indexes("requests")}
        assert "kept_requests_by_end" in indexes
    finally:
        store.close()
    SqlStore(empty).close()  # the next start finds nothing to do
    assert _everything(empty) == before


def _note(statements: list[str], _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    statements.append(statement)


def test_the_migrations_give_the_tables_that_the_code_uses(empty: str) -> None:
    store = SqlStore(empty)
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
    store.close()


def test_a_newer_schema_is_refused_in_one_line(empty: str) -> None:
    SqlStore(empty).close()
    engine = _engine(empty)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(InvalidRequest) as error:
        SqlStore(empty)
    told = str(error.value)
    assert "schema 9999 is newer than" in told and "\n" not in told and len(told) < 200
    assert _version(empty) == "9999"


@pytest.mark.parametrize("column", ["finished_at", "labels"])
def test_a_missing_column_is_refused_at_the_start(empty: str, column: str) -> None:
    """`finished_at` fails the upgrade itself, `labels` only the check after it. Both leave the database as it was."""
    _old(empty, without=column)
    with pytest.raises(InvalidRequest) as error:
        SqlStore(empty)
    told = str(error.value)
    assert column in told and "restore a backup" in told and "\n" not in told and len(told) < 200
    assert not inspect(_engine(empty)).has_table("alembic_version")


def _version(url: str) -> str:
    engine = _engine(url)
    with engine.connect() as connection:
        found: str = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    engine.dispose()
    return found


def test_the_sweep_reads_only_old_requests(tmp_path: Path) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    queries: list[tuple[str, Any]] = []
    event.listen(store.engine, "before_cursor_execute", lambda *given: queries.append((given[2], given[3])))
    store.forget(1.0, 2.0)
    read = [given for given in queries if given[0].startswith("SELECT")]
    assert len(read) == 2
    with store.engine.connect() as connection:
        plans = [list(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values)) for query, values in read]
    store.close()
    for plan, index in zip(plans, ("kept_requests_by_end", "private_requests_by_end"), strict=True):
        assert any(f"INDEX {index} (finished_at<" in step[3] for step in plan), plan


def test_a_failed_upgrade_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}"
    _old(url)
    before = _everything(url)
    monkeypatch.setattr("sparsectrl_lcm.service.store.schema._check", _stop)
    with pytest.raises(KeyboardInterrupt):
        SqlStore(url)
    engine = _engine(url)
    assert not inspect(engine).has_table("alembic_version")
    assert _everything(url) == before
    engine.dispose()


def _stop(_: object) -> None:
    raise KeyboardInterrupt
