"""A copied data folder on one PostgreSQL: only one of its servers takes requests."""

import asyncio
import json
import os
import shutil
import threading
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sparsectrl_lcm.runtime import InvalidRequest
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.data_folder import owner_name
from sparsectrl_lcm.service.routes import monitoring
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import OwnerLock, SqlStore, owner_lock

from .stand_in import StandIn, ended, new, periodic_work_done, serving, until, warnings_in

pytestmark = pytest.mark.usefixtures("soon")

OTHER_SESSION = "the database has a session of a server with a copy of this data folder, or one that was lost"


def end_session(database: str, owner: str) -> bool:
    """Ends the session that has the lock of a server, as a failover does; returns False if there is none."""
    with psycopg.connect(database) as connection:
        ended = """select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and granted
            and (classid::bigint << 32 | objid::bigint) = hashtextextended('server ' || %s, 0)"""
        return connection.execute(ended, [owner]).fetchall() == [(True,)]


def close(service: Service) -> None:
    service.owner_lock.close()
    service.store.close()


async def ready(service: Service) -> Any:
    return json.loads(bytes((await monitoring.readyz(service)).body))


def test_the_second_server_is_refused(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"

    async def scenario(_: Service, __: StandIn) -> None:
        shutil.copytree(first, copy)
        with monkeypatch.context() as patch, pytest.raises(InvalidRequest) as refused:
            patch.setattr(owner_lock, "START_SECONDS", 0.3)
            open_service(Settings(copy, database=database), StandIn())
        assert (refused.value.field, refused.value.reason) == (
            "data",
            f"a server with {copy} or a copy of it uses the database",
        )
        close(open_service(Settings(tmp_path / "other", database=database), StandIn()))

    serving(first, scenario, database=database)
    close(open_service(Settings(copy, database=database), StandIn()))  # the first has ended


def test_the_name_of_a_server_survives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    name = owner_name(tmp_path)
    assert synced[0] == len(name)
    assert len(synced) == 2, "the file, then its folder"
    assert owner_name(tmp_path) == name


def test_a_start_waits_for_the_session_of_the_server_before(database: str) -> None:
    store, name = SqlStore(database), uuid.uuid4().hex
    before, after = OwnerLock(store.engine, name), OwnerLock(store.engine, name)
    assert before.take()
    threading.Timer(0.15, before.close).start()
    assert after.take()
    after.close()
    store.close()


def test_a_server_that_ends_leaves_no_lock(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if PostgreSQL notices the end of its session only later: a restart waits for nothing."""
    store, name = SqlStore(database), uuid.uuid4().hex
    before, after = OwnerLock(store.engine, name), OwnerLock(store.engine, name)
    assert before.take()
    assert before._session is not None
    with closing(before._session.connection.dbapi_connection):
        with monkeypatch.context() as patch:
            patch.setattr(psycopg.Connection, "close", lambda _: None)
            before.close()
        monkeypatch.setattr(owner_lock, "START_SECONDS", 0.0)
        assert after.take()
    assert warnings_in(caplog) == []
    after.close()
    store.close()


def test_a_lost_session_takes_the_lock_again(database: str, tmp_path: Path) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        assert end_session(database, service.board.owner)
        row = new(service.board.owner, key_id=service.board.owner)
        await service.board.submit(row, limit=99, key_limit=99)
        assert (await ended(service, row.id, row.key_id)).status == 200
        await until(lambda: end_session(database, service.board.owner))

    serving(tmp_path, scenario, database=database)


def test_a_server_whose_lock_another_has_begins_nothing(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqlStore(database)

    async def scenario(service: Service, runner: StandIn) -> None:
        lock, owner = service.owner_lock, service.board.owner
        other = OwnerLock(store.engine, owner)

        def lose() -> None:
            """Instead of the next check: the session ends, and the other server is quicker."""
            del lock.check
            lock.close()
            assert other.take()
            lock.check()

        lock.check = lose  # type: ignore[method-assign]
        await until(lambda: lock.problem is not None)
        assert (await ready(service))["problem"] == OTHER_SESSION
        row = new(owner, key_id=owner)
        await service.board.submit(row, limit=99, key_limit=99)
        await asyncio.sleep(0.3)
        assert (await service.board.view(row.id, owner)).row.state == "queued"
        store.claim(row.id, owner, time.time(), 60.0)  # by the other, which has the same name
        await periodic_work_done(service)
        assert store.get(row.id).state == "running"  # not given back
        store.give_back(owner, (), time.time())
        other.close()
        assert (await ended(service, row.id, owner)).status == 200
        while (await ready(service))["status"] != "ready":
            await asyncio.sleep(0.01)

    serving(tmp_path, scenario, database=database)
    store.close()
    assert warnings_in(caplog) == [
        f"{OTHER_SESSION}: this server begins no request until that session ends",
        "the other session of this data folder has ended: this server goes on",
    ]


def test_sqlite_needs_no_lock(tmp_path: Path) -> None:
    """Its folder is locked, and a copy of it has a database of its own."""
    store = SqlStore(f"sqlite:///{tmp_path / 'a'}")
    assert all(OwnerLock(store.engine, owner_name(tmp_path)).take() for _ in range(2))
    store.close()
