"""SQLite's file gives the space of ended requests back to the disk, and its unused pages count as free space."""

import asyncio
import contextlib
import shutil
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import NewRequest, SqlStore

from .conftest import APP, started
from .waiting import wait_until

MIB = 2**20
KEPT = 12 * MIB
"""More than the unused pages that stay for the next requests, and the log of writes."""
REQUESTS = 20
SCHEMA = Path(__file__).parent / "schemas/sqlite.sql"


def database(folder: Path) -> Path:
    return folder / "data/service.sqlite3"


def fill(path: Path, requests: int = REQUESTS, first: int = 0) -> None:
    """Submits requests with large inputs and cancels them, as a server would, and leaves one that waits."""
    store = SqlStore(f"sqlite:///{path}")
    for number in range(first, first + requests):
        given = {"prompt": "a", "keyframe_0_image_url": "data:," + "x" * 1_600_000}
        store.submit(NewRequest(str(number), "k", APP, given, time.time(), "http://x"), limit=1000, key_limit=1000)
    for number in range(first + 1, first + requests):
        store.cancel(str(number), time.time())
    store.close()


def sizes(folder: Path) -> tuple[int, int]:
    """The bytes of the database, and of its write-ahead log."""
    path = database(folder)
    log = path.with_name(path.name + "-wal")
    return path.stat().st_size, log.stat().st_size if log.exists() else 0


def test_the_file_shrinks_when_requests_have_ended(tmp_path: Path) -> None:
    database(tmp_path).parent.mkdir()
    fill(database(tmp_path))
    assert sizes(tmp_path)[0] > 2 * KEPT
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        wait_until(lambda: sum(sizes(tmp_path)) < KEPT, problem=f"{server.data} stays large")
    is_whole(tmp_path)


def test_a_file_of_an_earlier_version_shrinks_too(tmp_path: Path) -> None:
    old_database(database(tmp_path))
    fill(database(tmp_path))
    opened(tmp_path).store.close()
    assert sum(sizes(tmp_path)) < KEPT
    is_whole(tmp_path)
    fill(database(tmp_path), first=REQUESTS)
    store = opened(tmp_path).store
    while store.shrink():
        pass
    store.close()
    assert sum(sizes(tmp_path)) < KEPT


def is_whole(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(database(folder))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM requests").fetchone() == (REQUESTS,)


def opened(folder: Path, **settings: Any) -> Service:
    return open_service(Settings(folder / "data", pipeline="stub_pipeline:load", **settings))


def old_database(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA.read_text())
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (0,)


def test_a_full_disk_leaves_the_file_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewrite of an earlier version's file would need more than is free. The server starts nevertheless."""
    old_database(database(tmp_path))
    fill(database(tmp_path), 10)
    before = sizes(tmp_path)[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=MIB))
    service = opened(tmp_path)
    assert service.store.shrink() is False
    assert service.store.get("0") is not None
    service.store.close()
    assert sizes(tmp_path)[0] == before


def test_the_log_of_writes_is_bounded(tmp_path: Path) -> None:
    database(tmp_path).parent.mkdir()
    store = SqlStore(f"sqlite:///{database(tmp_path)}")
    given = {"prompt": "a", "keyframe_0_image_url": "data:," + "x" * 40 * MIB}
    for number, text in enumerate([given, {}, {}]):
        store.submit(NewRequest(str(number), "k", APP, text, time.time(), "http://x"), limit=9, key_limit=9)
    assert sizes(tmp_path)[1] <= 16 * MIB
    store.close()


def test_a_disk_full_of_unused_pages_takes_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"

    def used(_: object) -> SimpleNamespace:
        return SimpleNamespace(free=40 * MIB - sum(path.stat().st_size for path in data.rglob("*") if path.is_file()))

    async def scenario() -> list[int]:
        service = opened(tmp_path, anonymous=True, free_bytes=20 * MIB)
        monkeypatch.setattr(shutil, "disk_usage", used)
        transport = httpx.ASGITransport(create_app(service))
        answers = []
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            ids = []
            given = {"prompt": "a", "keyframe_0_image_url": "data:," + "x" * MIB}
            while (answer := await client.post(f"/queue/{APP}", json=given)).status_code == 200:
                ids.append(answer.json()["request_id"])
            answers.append(answer.status_code)
            for request_id in ids:
                (await client.put(f"/queue/{APP}/requests/{request_id}/cancel")).raise_for_status()
            answers.append((await client.post(f"/queue/{APP}", json=given)).status_code)
        service.store.close()
        return answers

    assert asyncio.run(scenario()) == [507, 200]
