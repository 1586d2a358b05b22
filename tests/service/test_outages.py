"""A database that fails for a while: calls are told, readiness and one line tell it, and all goes on afterwards."""

import asyncio
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from fakes import postgresql_server
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.routes import monitoring, new_requests
from sparsectrl_lcm.service.store import database as database_module
from sparsectrl_lcm.service.store.outage import StoreUnavailable
from sqlalchemy import event

from .conftest import APP, Server, started
from .holds import Hold
from .stand_in import StandIn, ended, failing, periodic_work_done, serving, warnings_in
from .stand_in import submit as submit_to
from .waiting import SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("soon")

OUTAGE_SECONDS = 2.5
"""How long an outage lasts at least: longer than a key is remembered."""


@contextmanager
def locked(server: Server) -> Iterator[None]:
    """Another process writes to the database all the time."""
    with closing(sqlite3.connect(server.data / "service.sqlite3", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    folder = postgresql_server.folder_of(server.options["database"])
    postgresql_server.stop(folder)
    try:
        yield
    finally:
        postgresql_server.start(folder)


@contextmanager
def read_only(server: Server) -> Iterator[None]:
    """As after a failover to a server that still follows another one."""
    url = server.options["database"]

    def reloaded(read_only: str) -> bool:
        """PostgreSQL has told all its sessions before it accepts a further one with the new value."""
        with psycopg.connect(url) as further:
            return further.execute("SHOW default_transaction_read_only").fetchone() == (read_only,)

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        try:
            wait_until(lambda: reloaded("on"))
            yield
        finally:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            connection.execute("SELECT pg_reload_conf()")
            wait_until(lambda: reloaded("off"))


class Stream:
    """The events of a request, read in a thread until its end."""

    def __init__(self, server: Server, method: str, path: str, **options: Any) -> None:
        self.status: int | None = None
        self.events: list[dict[str, Any]] = []
        self.failed: Exception | None = None
        self._call = (method, server.url + path, {"headers": server.headers(), "timeout": 60, **options})
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        method, url, options = self._call
        try:
            with httpx.stream(method, url, **options) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except Exception as error:
            self.failed = error


def submit(server: Server, prompt: str) -> str:
    answer = httpx.post(server.queue, json={"prompt": prompt, "seed": 1}, headers=server.headers())
    return str(answer.raise_for_status().json()["request_id"])


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(server.url + path, headers=server.headers())


def lines(server: Server, text: str) -> int:
    return sum(text in json.loads(line)["message"] for line in server.log.splitlines())


def endure(server: Server, hold: Hold, outage: Any, problem: str, *, reads: bool) -> None:
    """Goes through an outage during which a clip is made for a stream and another for a connected caller."""
    failures, recoveries = lines(server, "the database failed"), lines(server, "the database works again")
    path = server.queue.removeprefix(server.url) + "/requests/"
    ran = submit(server, hold.prompt)
    states = Stream(server, "GET", f"{path}{ran}/status/stream")
    run = Stream(server, "POST", "/fal-ai/animatediff-sparsectrl-lcm/stream", json={"prompt": "slow 0.1"})
    wait_until(lambda: states.status == run.status == 200)
    wait_until(lambda: get(server, f"{path}{ran}/status").json()["status"] == "IN_PROGRESS")
    with outage(server):
        end = time.monotonic() + OUTAGE_SECONDS
        hold.let_go()
        wait_until(lambda: get(server, "/readyz").json() == {"status": "failed", "problem": problem})
        assert get(server, "/readyz").status_code == 503
        while time.monotonic() < end:
            refused = httpx.post(server.queue, json={"prompt": "b"}, headers=server.headers())
            assert (refused.status_code, refused.json()["error_type"]) == (503, "runner_scheduling_failure")
            assert int(refused.headers["Retry-After"]) > 0
            assert get(server, f"{path}unknown").status_code == (404 if reads else 503)
            assert states.thread.is_alive()
            assert run.thread.is_alive()
            time.sleep(0.1)
    server.wait()
    for stream in (states, run):
        stream.thread.join(SECONDS)
        assert stream.failed is None
    assert states.events[-1]["status"] == "COMPLETED"
    assert "video" in run.events[-1]
    assert get(server, f"{path}{ran}").json()["seed"] == 1
    assert lines(server, "the database failed") == failures + 1
    assert lines(server, "the database works again") == recoveries + 1
    assert "Traceback" not in server.log


def test_sqlite(tmp_path: Path, hold: Hold) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        server.wait()
        endure(server, hold, locked, "the database cannot be written", reads=True)


def test_postgresql(database: str, tmp_path: Path) -> None:
    holds = [Hold(tmp_path / name) for name in ("stopped", "read_only")]
    for server in started(tmp_path, pipeline="stub_pipeline:load", database=database):
        server.wait()
        endure(server, holds[0], stopped, "the database does not answer", reads=False)
        endure(server, holds[1], read_only, "the database cannot be written", reads=True)


def test_refused_writes_are_found_without_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The calls of clients may all be reads."""
    monkeypatch.setattr(database_module, "WRITE_PROBE_SECONDS", 0.1)
    refuse = [False]

    async def ready(service: Service) -> Any:
        return json.loads(bytes((await monitoring.readyz(service)).body))

    async def scenario(service: Service, _: StandIn) -> None:
        @event.listens_for(service.store.engine, "checkout")
        def taken(connection: Any, *_: Any) -> None:
            connection.execute(f"PRAGMA query_only={refuse[0]}")

        refuse[0] = True
        while (answer := await ready(service))["status"] == "ready":
            await asyncio.sleep(0.01)
        assert answer["problem"] == "the database cannot be written"
        with pytest.raises(StoreUnavailable):
            await service.board.cancel("a")
        assert sum((await service.board.counts(APP)).values()) == 0
        refuse[0] = False
        while (await ready(service))["status"] != "ready":
            await asyncio.sleep(0.01)

    serving(tmp_path, scenario)
    assert warnings_in(caplog) == [
        "the database failed: attempt to write a readonly database",
        "the database works again",
    ]


@pytest.mark.parametrize("outage", [True, False])
def test_other_servers_get_time_to_renew_their_leases(database: str, outage: bool, tmp_path: Path) -> None:
    """After a start and an outage, in which nobody could. Otherwise a clip of theirs would be made twice."""
    name = uuid.uuid4().hex

    async def scenario(service: Service, runner: StandIn) -> None:
        runner.capacity = 0
        await submit_to(service, name)
        service.store.claim(name, "another server", time.time(), -1.0)
        if outage:
            service.store.outage.begin(OSError("gone"), time.monotonic(), reads=True)
        await periodic_work_done(service)
        row = service.store.get(name)
        assert row is not None
        assert (row.state, row.owner) == ("running", "another server")
        assert service.store.outage.problem is None
        service.store.outage.works_since -= service.settings.lease_seconds  # as if the time had passed
        runner.capacity = 1
        assert (await ended(service, name)).status == 200

    serving(tmp_path, scenario, database=database)


def test_a_run_whose_client_leaves_during_an_outage_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        runner.capacity = 0
        await submit_to(service, "a", kind="run")
        failing(monkeypatch, service.store, "cancel", 2, committed=False)
        await new_requests._cancel_unfinished(service, service.endpoints[APP], "a")
        outcome = await ended(service, "a")
        assert (outcome.status, outcome.error_type) == (499, "client_disconnected")

    serving(tmp_path, scenario)
