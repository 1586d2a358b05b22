"""What the headers of a submit ask for: priority, a start deadline, a short life."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from .conftest import Server
from .holds import Hold
from .waiting import SECONDS


@pytest.fixture
def client(stub: Server) -> Iterator[httpx.Client]:
    with httpx.Client(headers=stub.headers(), timeout=30) as client:
        yield client


def ended(client: httpx.Client, url: str) -> dict[str, Any]:
    end = time.monotonic() + SECONDS
    while (answer := client.get(url, params={"logs": "1"})).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.02)
    state: dict[str, Any] = answer.json()
    return state


def test_low_priority_runs_after_normal(stub: Server, client: httpx.Client, hold: Hold) -> None:
    held = [client.post(stub.queue, json={"prompt": hold.prompt}).json() for _ in range(3)]
    made = {}
    for name in ("low", "normal"):
        headers = {"X-Fal-Queue-Priority": name}
        made[name] = client.post(stub.queue, json={"prompt": "a"}, headers=headers).json()
    assert made["low"]["queue_position"] > 0
    full = client.post(stub.queue, json={"prompt": "a"}, params={"fal_max_queue_length": 0})
    assert full.status_code == 429
    hold.let_go()
    began = {name: ended(client, one["status_url"])["logs"][0]["timestamp"] for name, one in made.items()}
    assert began["normal"] < began["low"]
    assert {ended(client, one["status_url"])["status"] for one in held} == {"COMPLETED"}


def test_a_request_that_starts_too_late_ends(stub: Server, client: httpx.Client, hold: Hold) -> None:
    held = client.post(stub.queue, json={"prompt": hold.prompt}).json()
    while client.get(held["status_url"]).json()["status"] == "IN_QUEUE":
        time.sleep(0.02)
    late = client.post(stub.queue, json={"prompt": "a"}, headers={"X-Fal-Request-Timeout": "0.3"}).json()
    state = ended(client, late["status_url"])
    assert (state["status"], state["error_type"]) == ("COMPLETED", "startup_timeout")
    answer = client.get(late["response_url"])
    assert (answer.status_code, answer.headers["x-fal-request-timeout-type"]) == (504, "user")
    hold.let_go()
    assert ended(client, held["status_url"]).get("error") is None


def test_what_is_not_to_be_kept(stub: Server, client: httpx.Client, hold: Hold) -> None:
    private = {"X-Fal-Store-IO": "0", "X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds":60}'}
    client.post(stub.queue, json={"prompt": hold.prompt})
    made = client.post(stub.queue, json={"prompt": "a prompt to forget"}, headers=private).json()
    assert "a prompt to forget" in stored(stub)
    hold.let_go()
    ended(client, made["status_url"])
    clip = client.get(made["response_url"]).json()["video"]["url"]  # the caller still gets the clip
    assert httpx.get(clip).status_code == 200
    assert "a prompt to forget" not in stored(stub)
    with closing(sqlite3.connect(stub.data / "service.sqlite3")) as database, database:
        database.execute("UPDATE files SET expires_at = expires_at - 60")  # as if a minute had passed
    assert httpx.get(clip).status_code == 404


def stored(server: Server) -> str:
    with closing(sqlite3.connect(server.data / "service.sqlite3")) as database:
        return "\n".join(database.iterdump())
