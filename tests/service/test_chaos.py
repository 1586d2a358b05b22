"""Everything fails while many clients work: each accepted request ends with its own clip, made once."""

import json
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from fakes.marked_pipeline import seed_of
from fakes.postgresql_server import folder_of, postgresql

from .persistent_clients import Accepted, Crowd
from .server_faults import Faults, small_disk
from .supervised_server import SupervisedServer
from .waiting import wait_until
from .webhook_inbox import inbox

CLIENTS, REQUESTS = 60, 5
SECONDS = 60.0
"""How long the clients take for their submissions if nothing fails."""
POSTGRESQL = ("kill", "crash_database", "freeze_database", "kill_without_database", "kill_on_full_disk")
SQLITE = ("kill", "fill_disk", "kill", "kill_on_full_disk")
INTERRUPTIONS = ("kill", "disk")
"""Faults with these words in their names interrupt clips that are being made."""


@pytest.mark.slow
def test_with_postgresql(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for url in postgresql(Path(folder)):
            endure(tmp_path, url, 2, POSTGRESQL)


@pytest.mark.slow
def test_with_sqlite(tmp_path: Path) -> None:
    endure(tmp_path, None, 1, SQLITE)


def endure(folder: Path, database: str | None, runners: int, names: tuple[str, ...]) -> None:
    with (
        small_disk(folder / "disk") as disk,
        inbox() as hooks,
        SupervisedServer(disk / "data", folder / "logs", database, runners) as server,
    ):
        crowd = Crowd(server, server.new_key(), CLIENTS, REQUESTS, SECONDS, hooks)
        faults = Faults(server, disk, folder_of(database) if database else None)
        crowd.start()
        for number, name in enumerate(names, 1):
            share = CLIENTS * REQUESTS * number // (len(names) + 1)
            wait_until(lambda share=share: len(crowd.accepted) >= share, 600, f"less than {share} were accepted")
            faults.run(name)
        crowd.join(600)
        report(crowd, faults)
        check_requests(crowd)
        check_makes(crowd.accepted, faults)
        check_webhooks(crowd)
        assert server.stop() == 0
        assert "Traceback" not in server.log


def report(crowd: Crowd, faults: Faults) -> None:
    print()
    for name, begun, ended in faults.spans:
        print(f"{name}: {ended - begun:.1f} s")
    print(f"{len(crowd.accepted)} accepted, exit codes {faults.server.ended}, repeated {crowd.refused}")
    print("ends", Counter((request.kind, request.code) for request in crowd.accepted))
    print("unexpected", Counter(crowd.unexpected).most_common(20))
    print("deliveries of a webhook", Counter(map(len, crowd.hooks.got.of.values())))


def check_requests(crowd: Crowd) -> None:
    """Every accepted request has ended with the clip of its seed, which stays as it is."""
    assert crowd.unexpected == []
    assert len({request.request_id for request in crowd.accepted}) == len(crowd.accepted) == CLIENTS * REQUESTS
    for request in crowd.accepted:
        assert (request.code, request.status.get("error")) == (200, None), request
        assert (request.result["seed"], seed_of(request.clip)) == (request.seed, request.seed)
    with crowd.http() as http:
        for request in crowd.accepted:
            assert crowd.read_again(http, request) == (request.result, request.clip)


def check_makes(accepted: list[Accepted], faults: Faults) -> None:
    """No clip is made again, unless the server was killed or its disk was full; none after its end was told."""
    made: dict[int, list[tuple[float, float]]] = {request.seed: [] for request in accepted}
    for line in faults.server.made.read_text().splitlines():
        seed, begun, ended = line.split()
        made[int(seed)].append((float(begun), float(ended)))  # a KeyError: nobody was told of this request
    again = 0
    for request in accepted:
        makes = made[request.seed]
        assert makes, request
        assert max(begun for begun, _ in makes) < request.ended_at, request
        for (_, before), (after, _) in pairwise(makes):
            again += 1
            between = [name for name, begun, ended in faults.spans if before < ended and begun < after]
            assert any(word in name for word in INTERRUPTIONS for name in between), (request, makes, faults.spans)
    print(f"{again} clips were made again after a kill or on a full disk")


def check_webhooks(crowd: Crowd) -> None:
    """Every webhook arrives, once or marked as a repetition."""
    for request in crowd.accepted:
        if request.kind != "webhook":
            continue
        deliveries = crowd.hooks.got.of[request.request_id]
        assert all(int(headers["x-webhook-attempt"]) > 1 for headers, _ in deliveries[1:])
        told = [json.loads(body) for _, body in deliveries]
        assert all(one == told[0] for one in told)
        assert (told[0]["status"], told[0]["payload"]) == ("OK", request.result)
