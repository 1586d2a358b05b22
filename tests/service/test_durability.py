"""No accepted request is lost, however the server ends."""

import math
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Server, started
from .holds import Hold
from .waiting import wait_until, wait_until_it_is

CLIENTS, REQUESTS, KILLS = 10, 60, 2
APART_SECONDS = 3.0
"""Seconds between kills: time for the server to start again and to make clips."""


@pytest.mark.slow
def test_a_thousand_requests_of_a_hundred_clients_survive_five_kills(tmp_path: Path) -> None:
    endure(tmp_path, 100, 1000, 5)


def test_requests_survive_kills(tmp_path: Path) -> None:
    endure(tmp_path, CLIENTS, REQUESTS, KILLS)


@dataclass
class Clients:
    """Clients that each submit a share of the requests, spread over the time of all kills. They retry failures.

    `allowed` is how many each may submit so far.
    """

    server: Server
    count: int
    share: int
    seconds: float
    webhook: str | None = None
    allowed: float = math.inf
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
                wait_until(lambda place=seed % self.share: place < self.allowed, 240)
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
    with contextmanager(started)(folder, pipeline="stub_pipeline:load") as server:
        server.wait()
        share = requests // count
        clients = Clients(server, count, share, APART_SECONDS * (kills + 1), allowed=share - kills)
        threads, seen, interrupted = clients.start(), {}, 0

        def clips_are_made() -> bool:
            seen.update(ended(server, clients.accepted))
            return bool(seen)

        for kill in range(kills):
            submitted = requests * (kill + 1) // (kills + 1)
            wait_until(lambda submitted=submitted: len(clients.accepted) >= submitted, 240)
            wait_until(clips_are_made)
            refused = clients.refused
            server.kill()
            clients.allowed += 1  # whatever was submitted until now, each has another one for the dead server
            wait_until(lambda refused=refused: clients.refused > refused)
            interrupted += running(server)
            server.start()
        for thread in threads:
            thread.join(240)
        assert len(set(clients.accepted.values())) == len(clients.accepted) == requests
        results = {seed: result(server, request_id) for seed, request_id in clients.accepted.items()}
        for seed, (status, body) in results.items():
            assert (status["status"], status.get("error"), body["seed"]) == ("COMPLETED", None, seed)
        assert seen.items() <= {seed: body["video"]["url"] for seed, (_, body) in results.items()}.items()
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


def test_an_interrupted_request_runs_again(tmp_path: Path, hold: Hold) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        client = httpx.Client(headers=server.headers())
        request_id = client.post(server.queue, json={"prompt": hold.prompt, "seed": 7}).json()["request_id"]
        wait_until_it_is("IN_PROGRESS", client, f"{server.queue}/requests/{request_id}")
        server.kill()
        hold.let_go()
        server.start()
        assert server.data.stat().st_mode & 0o777 == 0o700
        assert result(server, request_id)[1]["seed"] == 7


def test_sigterm_lets_the_running_request_end_and_keeps_the_others(tmp_path: Path, hold: Hold) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        client = httpx.Client(headers=server.headers())
        given = [{"prompt": hold.prompt, "seed": seed} for seed in range(4)]
        ids = [client.post(server.queue, json=each).json()["request_id"] for each in given]
        wait_until_it_is("IN_PROGRESS", client, f"{server.queue}/requests/{ids[0]}")
        with ThreadPoolExecutor(1) as thread:
            stopped = thread.submit(server.stop)
            while client.get(f"{server.url}/readyz").json() != {"status": "draining"}:
                time.sleep(0.02)
            hold.let_go()
            assert stopped.result() == 0
        server.start()
        assert client.get(f"{server.queue}/requests/{ids[0]}").json()["seed"] == 0
        assert [result(server, request_id)[1]["seed"] for request_id in ids] == [0, 1, 2, 3]
