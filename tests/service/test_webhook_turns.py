"""Keys take turns in the delivery of webhooks, so that the receivers of one key cannot hold up those of others."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sparsectrl_lcm.service.store import NewRequest, Outcome, SqlStore, WebhookRow

from .conftest import APP, Server, end_all, started
from .test_webhooks import Receiver
from .waiting import SECONDS, wait_until

HANGING = 200
"""Webhooks to receivers that hang, each to another host: three times as many as run at once."""


@pytest.fixture
def hanging() -> Iterator[int]:
    """The port of receivers at every loopback address, whose connections are made and never answered."""
    with socket.create_server(("0.0.0.0", 0), backlog=1000) as sock:
        yield sock.getsockname()[1]


def submit(server: Server, client: httpx.Client, url: str) -> None:
    client.post(server.queue, json={}, params={"fal_webhook": url}).raise_for_status()


def test_hanging_receivers_of_a_key_delay_no_other_key(tmp_path: Path, hanging: int) -> None:
    fast = Receiver()
    threading.Thread(target=fast.serve_forever, daemon=True).start()
    for server in started(
        tmp_path, pipeline="stub_pipeline:load", allow_private=["127.0.0.0/8"], webhook_seconds=5 * SECONDS
    ):
        with httpx.Client(headers=server.headers()) as client:
            for number in range(HANGING):
                submit(server, client, f"http://127.0.{1 + number // 200}.{1 + number % 200}:{hanging}/")
            client.headers.update(server.headers(server.new_key("another")))
            submit(server, client, fast.url)
            wait_until(lambda: len(fast.got) == 1)
        server.kill()  # a stop would wait for the receivers
    fast.shutdown()
    fast.server_close()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    shared = request.param == "postgresql"
    made = SqlStore(request.getfixturevalue("database") if shared else f"sqlite:///{tmp_path / 'a.sqlite3'}")
    end_all(made)
    yield made
    end_all(made)
    made.close()


def test_turns_of_keys(store: SqlStore) -> None:
    salt, times = time.monotonic_ns(), itertools.count()
    keys = {name: f"{name}{salt}" for name in "abc"}
    for name in "aaaaaabbc":
        number = next(times)
        request = NewRequest(
            f"{name}{number}-{salt}", keys[name], APP, {}, float(number), "http://x", webhook=f"http://{number}/"
        )
        store.submit(request, limit=10**6, key_limit=9, outcome=Outcome(422, {}, "x"))

    def due(limit: int, key_limit: int, under_way: tuple[WebhookRow, ...] = ()) -> tuple[WebhookRow, ...]:
        rows = store.due_webhooks(100.0, 1000.0, limit, (), under_way, key_limit)
        assert {row.key_id for row in rows} <= set(keys.values())
        return tuple(rows)

    def names(rows: tuple[WebhookRow, ...]) -> list[str]:
        return [row.request_id.partition("-")[0] for row in rows]

    first = due(4, 3)
    assert names(first) == ["a0", "a1", "b6", "c8"]  # one of each key, then the oldest
    second = due(4, 3, first)
    assert names(second) == ["a2", "b7"]
    assert names(due(4, 3, first + second)) == []
    assert names(due(4, 3, second)) == ["a3", "a4"]  # the first ones have ended
    assert names(due(4, 3)) == ["a5"]
