"""PostgreSQL that falls silent: calls end, readiness tells it, and the server can be stopped."""

import asyncio
import json
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.silent_proxy import silent_proxy
from sparsectrl_lcm.service.data_folder import owner_name
from sparsectrl_lcm.service.queue import periodic_work
from sparsectrl_lcm.service.routes import monitoring
from sparsectrl_lcm.service.server import open_service, running
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import SqlStore, postgresql
from sparsectrl_lcm.service.store import database as database_module
from sparsectrl_lcm.service.store.deadline import LAST_SECONDS
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from .conftest import APP, started
from .stand_in import StandIn, submit
from .waiting import SECONDS, wait_until


def test_a_silent_database_holds_up_nothing_for_ever(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(periodic_work, "TICK_SECONDS", 0.05)
    folder = database.partition("host=")[2]
    before = uuid.uuid4().hex
    connect, connections = postgresql.connect, list[postgresql.BoundedConnection]()
    monkeypatch.setattr(postgresql, "connect", lambda *given: connections.append(connect(*given)) or connections[-1])

    def be_impatient() -> None:
        """As if less time had to pass. Not before: a busy machine may need it."""
        for connection in (postgresql.BoundedConnection, *connections):
            monkeypatch.setattr(connection, "bound", 1.0)
        monkeypatch.setattr(database_module, "CALL_SECONDS", 2.0)
        monkeypatch.setattr(postgresql, "CONNECT_SECONDS", 6)
        monkeypatch.setattr(monitoring, "STALE_SECONDS", 1.0)

    async def ready(service: Any) -> tuple[int, Any]:
        answer = await monitoring.readyz(service)
        return answer.status_code, json.loads(bytes(answer.body))

    async def main(port: int, freeze: Any) -> None:
        url = f"postgresql://test@127.0.0.1:{port}/postgres"
        service = open_service(Settings(tmp_path, database=url, drain_seconds=1.0), StandIn())
        async with running(service):
            await submit(service, before)
            while (await ready(service))[0] != 200:
                await asyncio.sleep(0.01)
            be_impatient()
            freeze()
            counts = [service.board.counts(APP) for _ in range(21)]
            failures = await asyncio.gather(submit(service, uuid.uuid4().hex), *counts, return_exceptions=True)
            assert all(isinstance(failure, SQLAlchemyError) for failure in failures), failures
            assert not any("connect" in str(failure) for failure in failures), "a call waits less than a connection"
            assert await ready(service) == (503, {"status": "failed", "problem": "the database does not answer"})
            start = time.monotonic()
        assert time.monotonic() - start < SECONDS / 3

    with silent_proxy(f"{folder}/.s.PGSQL.5432") as proxy:
        asyncio.run(asyncio.wait_for(main(proxy.port, proxy.freeze), SECONDS))
    store = SqlStore(database)
    store.cancel(before, time.time())  # other tests share the database
    store.close()


def test_sigterm_ends_a_server_whose_database_is_silent(database: str, tmp_path: Path) -> None:
    """With the bounds that servers have, within the time for a drain and what one connection takes, or twice that."""
    with silent_proxy(f"{database.partition('host=')[2]}/.s.PGSQL.5432") as proxy:
        url = f"postgresql://test@127.0.0.1:{proxy.port}/postgres"
        for server in started(tmp_path, pipeline="stub_pipeline:load", database=url, drain_seconds=3.0):
            server.wait()
            made = httpx.post(server.queue, headers=server.headers(), json={"prompt": "slow 0.3"}).json()
            proxy.freeze()
            start = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - start < 2 * (3 + 2 * LAST_SECONDS + postgresql.CONNECT_SECONDS)
    opened = SqlStore(database)
    opened.give_back(owner_name(tmp_path / "data"), [], time.time())
    opened.cancel(made["request_id"], time.time())  # no later server shall make it
    opened.close()


def test_the_database_ends_a_statement_for_which_nobody_waits(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, watcher = SqlStore(database), SqlStore(database)
    opened.engine.dispose()
    with monkeypatch.context() as patch:
        patch.setattr(postgresql.BoundedConnection, "bound", 0.5)
        with pytest.raises(SQLAlchemyError), opened._read() as connection:
            connection.execute(text("SELECT pg_sleep(30)"))
    running_on = text("SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(30)'")
    with watcher.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        wait_until(lambda: not connection.execute(running_on).scalar_one(), SECONDS / 3)
        assert connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one() == "1min"
    opened.close()
    watcher.close()
