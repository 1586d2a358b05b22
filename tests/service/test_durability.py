"""No accepted request is lost, however the server ends."""

import random
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Server, started

CLIENTS, REQUESTS, KILLS = 10, 60, 2
APART_SECONDS = 4.0
"""Seconds between kills: time for the server to start again and to make clips."""


@pytest.mark.slow
def test_a_thousand_requests_of_a_hundred_clients_survive_five_kills(tmp_path: Path) -> None:
    endure(tmp_path, 100, 1000, 5)


def test_requests_survive_kills(tmp_path: Path) -> None:
    endure(tmp_path, CLIENTS, REQUESTS, KILLS)


@dataclass
class Clients:
    """Clients that each submit a share of the requests, spread over the time of all kills. They retry failures."""

    server: Server
    count: int
    share: int
    seconds: float
    webhook: str | None = None
    accepted: dict[int, str] = field(default_factory=dict)
    refused: int = 0

    @property
    def _parameters(self) -> dict[str, str]:
        return {} if self.webhook is None else {"fal_webhook": self.webhook}

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._submit, args=(number,), daemon=True) for number in range(self.count)]
        for thread in threads:
            thread.start()
        return threads

    def _submit(self, number: int) -> None:
        with httpx.Client(headers=self.server.headers(), timeout=30) as client:
            for seed in range(number * self.share, (number + 1) * self.share):
                time.sleep(random.uniform(0, 2 * self.seconds / self.share))
                while seed not in self.accepted:
                    try:
                        given = {"json": {"prompt": "slow 0.02", "seed": seed}, "params": self._parameters}
                        answer = client.post(self.server.queue, **given)
                        self.accepted[seed] = answer.raise_for_status().json()["request_id"]
                    except httpx.HTTPError:
                        self.refused += 1
                        time.sleep(0.1)


def endure(folder: Path, count: int, requests: int, kills: int) -> None:
    """Clients see exactly-once: each accepted request ends without an error, and its result never changes."""
    for server in started(folder, pipeline="stub_pipeline:load"):
        server.wait()
        clients = Clients(server, count, requests // count, APART_SECONDS * (kills + 1))
        threads, seen, interrupted = clients.start(), {}, 0
        for kill in range(kills):
            while len(clients.accepted) < requests * (kill + 1) // (kills + 1):
                time.sleep(0.01)
            seen |= ended(server, clients.accepted)
            refused = clients.refused
            server.kill()
            assert len(clients.accepted) < requests, "all requests were submitted before the kills"
            while clients.refused == refused:
                time.sleep(0.01)
            interrupted += running(server)
            server.start()
        for thread in threads:
            thread.join(240)
        assert len(set(clients.accepted.values())) == len(clients.accepted) == requests
        results = {seed: result(server, request_id) for seed, request_id in clients.accepted.items()}
        for seed, (status, body) in results.items():
            assert (status["status"], status.get("error"), body["seed"]) == ("COMPLETED", None, seed)
        assert seen.items() <= {seed: body["video"]["url"] for seed, (_, body) in results.items()}.items()
        assert seen, "no clip was made between kills"
        url = results[0][1]["video"]["url"]
        assert httpx.get(url).content[4:8] == b"ftyp"
        print(f"{requests} requests, {kills} kills, {interrupted} interrupted, {clients.refused} submissions refused")


def running(server: Server) -> int:
    """The number of requests that ran when the server was killed."""
    with closing(sqlite3.connect(server.data / "service.sqlite3")) as connection:
        return int(connection.execute("select count(*) from requests where state = 'running'").fetchone()[0])


def ended(server: Server, accepted: dict[int, str]) -> dict[int, str]:
    """The clips of the requests that have ended."""
    made = {}
    with httpx.Client(headers=server.headers(), timeout=30) as client:
        for seed, request_id in list(accepted.items())[:20]:
            answer = client.get(f"{server.queue}/requests/{request_id}")
            if answer.status_code == 200:
                made[seed] = answer.json()["video"]["url"]
    return made


def result(server: Server, request_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and result of a request, once it has ended."""
    with httpx.Client(headers=server.headers(), timeout=30) as client:
        url, end = f"{server.queue}/requests/{request_id}", time.monotonic() + 240
        while time.monotonic() < end:
            status = client.get(f"{url}/status").raise_for_status().json()
            if status["status"] == "COMPLETED":
                return status, client.get(url).raise_for_status().json()
            time.sleep(0.1)
    raise AssertionError(f"{request_id} is stuck: {server.log[-3000:]}")


def test_an_interrupted_request_runs_again(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        client = httpx.Client(headers=server.headers())
        request_id = client.post(server.queue, json={"prompt": "slow 0.4", "seed": 7}).json()["request_id"]
        while client.get(f"{server.queue}/requests/{request_id}/status").json()["status"] != "IN_PROGRESS":
            time.sleep(0.02)
        server.kill()
        server.start()
        assert server.data.stat().st_mode & 0o777 == 0o700
        assert result(server, request_id)[1]["seed"] == 7


def test_sigterm_lets_the_running_request_end_and_keeps_the_others(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        client = httpx.Client(headers=server.headers())
        ids = [client.post(server.queue, json={"prompt": "slow 0.2", "seed": n}).json()["request_id"] for n in range(4)]
        while client.get(f"{server.queue}/requests/{ids[0]}/status").json()["status"] != "IN_PROGRESS":
            time.sleep(0.02)
        assert server.stop() == 0
        server.start()
        assert client.get(f"{server.queue}/requests/{ids[0]}").json()["seed"] == 0
        assert [result(server, request_id)[1]["seed"] for request_id in ids] == [0, 1, 2, 3]
