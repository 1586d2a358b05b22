"""A Ray cluster of three nodes on this machine that loses nodes, replicas, the server and the database."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fakes import postgresql_server

from .conftest import APP, FAKES, Server, started
from .test_durability import Clients, result
from .test_webhooks import Receiver, receiving
from .waiting import wait_until

NODES, REPLICAS = 3, 8
PAUSE = 6.0
"""Seconds between two losses."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": REPLICAS, "include_dashboard": False})
        yield made
        made.shutdown()


def on_ray(cluster: Any, **more: Any) -> dict[str, Any]:
    settings = {"pool": "ray", "ray_address": cluster.address, "gpus_per_replica": 0.0, "retries": 5}
    return {"pipeline": "stub_pipeline:load", **settings, **more}


def states(server: Server) -> list[str]:
    ready = httpx.get(server.url + "/readyz", timeout=30).json()
    return [runner["state"] for runner in ready["endpoints"][APP]["runners"]]


@pytest.mark.slow
def test_replicas_follow_the_queue(cluster: Any, tmp_path: Path) -> None:
    """As many as there are requests, and the fewest again after a minute without work."""
    with contextmanager(started)(tmp_path, **on_ray(cluster, replicas="1..4")) as server:
        server.wait("/readyz", 120)
        with httpx.Client(headers=server.headers(), timeout=30) as client:
            for seed in range(40):
                client.post(server.queue, json={"prompt": "slow 0.5", "seed": seed}).raise_for_status()
        wait_until(lambda: states(server) == ["busy"] * 4, 60)
        wait_until(lambda: states(server) == ["ready"], 240)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    yield from receiving()


@pytest.mark.slow
def test_a_thousand_requests_survive_the_loss_of_everything(
    cluster: Any, database: str, receiver: Receiver, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=REPLICAS) for _ in range(NODES - 1)]
    settings = on_ray(cluster, replicas=f"{REPLICAS}", database=database)
    with contextmanager(started)(tmp_path, **settings) as server:
        server.wait("/readyz", 180)
        wait_until(lambda: len(states(server)) == REPLICAS, 120)

        def lose_a_node() -> None:
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=REPLICAS))

        def restart_the_server() -> None:
            server.kill()
            server.start()

        def restart_the_database() -> None:
            folder = postgresql_server.folder_of(database)
            postgresql_server.stop(folder)
            time.sleep(2)
            postgresql_server.start(folder)

        losses = [lose_a_node] * 2 + [kill_a_replica] * 5 + [restart_the_server] * 2 + [restart_the_database]
        random.Random(0).shuffle(losses)
        clients = Clients(server, 100, 10, PAUSE * len(losses), receiver.url)
        threads = clients.start()
        for lose in losses:
            time.sleep(PAUSE)
            lose()
        for thread in threads:
            thread.join(240)
        assert len(set(clients.accepted.values())) == len(clients.accepted) == 1000
        for seed, request_id in clients.accepted.items():
            status, body = result(server, request_id)
            assert (status["status"], status.get("error"), body["seed"]) == ("COMPLETED", None, seed)
        once_each(receiver, set(clients.accepted.values()))


def kill_a_replica() -> None:
    named = psutil.process_iter(["name"])  # leaves out processes that end meanwhile
    pids = [process.pid for process in named if process.info["name"].startswith("ray::ServeReplic")]
    os.kill(random.choice(pids), signal.SIGKILL)


def once_each(receiver: Receiver, request_ids: set[str]) -> None:
    """Each request's webhook came once, or with the numbers of its attempts.

    There may be more requests: those whose clients did not hear that they were accepted, and submitted them again.
    """

    def told() -> set[str]:
        return {json.loads(body)["request_id"] for _, body in receiver.got}

    wait_until(lambda: request_ids <= told(), 120)
    attempts = Counter((json.loads(body)["request_id"], headers["x-webhook-attempt"]) for headers, body in receiver.got)
    assert max(attempts.values()) == 1
