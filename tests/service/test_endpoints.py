"""Servers with different bundles on one database: each endpoint has a queue of its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.runtime.errors import InvalidRequest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.protocol.urls import DEFAULT_ENDPOINT
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import NewRequest, SqlStore, tables
from starlette.testclient import TestClient

from .conftest import started
from .test_dispatch import StandIn

OTHER = "me/portraits"


@pytest.fixture(params=["sqlite", "postgresql"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[SqlStore, SqlStore]]:
    """The stores of two servers with different endpoints."""
    shared = request.param == "postgresql"
    url = request.getfixturevalue("database") if shared else f"sqlite:///{tmp_path / 'a.sqlite3'}"
    pair = SqlStore(url), SqlStore(url, OTHER)
    with pair[0].engine.begin() as connection:
        connection.execute(tables.requests.delete())
    yield pair
    for store in pair:
        store.close()


def submit(store: SqlStore, *names: str) -> list[int]:
    """Submits requests whose key is the first letter of the name; returns how many wait ahead of each."""
    new = [NewRequest(name, name[0], {"prompt": name}, 1.0, "http://x") for name in names]
    return [store.submit(each, limit=100, key_limit=100).ahead for each in new]


def test_each_server_works_on_its_own_queue(stores: tuple[SqlStore, SqlStore]) -> None:
    one, other = stores
    assert submit(one, "a1", "a2", "b1") == [0, 1, 1]
    assert submit(other, "a3", "b2", "a4") == [0, 1, 2]
    assert (one.waiting(), list(other.ahead(9, 2.0))) == (["a1", "b1", "a2"], ["a3", "b2", "a4"])
    assert (one.counts(), other.counts()) == ({"queued": 3, "running": 0},) * 2
    assert other.claim("a3", "server", 2.0, 30.0) is not None
    assert (one.counts()["running"], other.counts()) == (0, {"queued": 2, "running": 1})
    assert submit(one, "c1") == [2]  # the turn that runs is that of its own queue


def test_a_cancelled_request_moves_only_those_of_its_queue(stores: tuple[SqlStore, SqlStore]) -> None:
    one, other = stores
    submit(one, "a1", "a2", "b1", "b2")
    submit(other, "a3", "a4", "b3", "b4")
    assert one.cancel("a1", 2.0) == "ended"
    assert one.waiting() == ["a2", "b1", "b2"]
    assert other.waiting() == ["a3", "b3", "a4", "b4"]


def test_endpoints_may_be_given_the_same_idempotency_key(stores: tuple[SqlStore, SqlStore]) -> None:
    for name, store, given in (("r1", stores[0], "f"), ("r2", stores[1], "g")):
        new = NewRequest(name, "k", {}, 1.0, "http://x", idempotency_key="order 17", fingerprint=given)
        for again in (new, replace(new, id="again")):
            assert store.submit(again, limit=100, key_limit=100).id == name


def test_any_server_knows_the_requests_of_all(stores: tuple[SqlStore, SqlStore]) -> None:
    one, other = stores
    submit(other, "a1")
    row = one.get("a1")
    assert row is not None and row.state == "queued"


def test_servers_with_different_bundles_share_keys_and_files(database: str, tmp_path: Path) -> None:
    common = {"pipeline": "stub_pipeline:load", "database": database, "files": str(tmp_path / "files")}
    for one in started(tmp_path / "one", **common):
        for other in started(tmp_path / "other", endpoint=OTHER, **common):
            urls = {}
            for server, name in ((one, DEFAULT_ENDPOINT), (other, OTHER)):
                answer = httpx.post(f"{server.url}/{name}", json={"prompt": "a"}, headers=one.headers(), timeout=60)
                urls[server.port] = answer.raise_for_status().json()["video"]["url"]
            from_one = urls[other.port].replace(other.url, one.url)
            assert httpx.get(from_one).content == httpx.get(urls[other.port]).raise_for_status().content
            assert httpx.post(f"{one.url}/{OTHER}", json={"prompt": "a"}, headers=one.headers()).status_code == 404


def test_the_name_is_in_the_paths_the_page_and_the_schema(tmp_path: Path) -> None:
    service = open_service(Settings(tmp_path, anonymous=True, endpoint=OTHER), StandIn())
    client = TestClient(create_app(service))
    submitted: dict[str, Any] = client.post(f"/queue/{OTHER}", json={"prompt": "a"}).raise_for_status().json()
    assert submitted["status_url"].startswith(f"http://testserver/queue/{OTHER}/requests/")
    assert client.get(submitted["status_url"]).json()["status"] == "IN_QUEUE"
    assert client.post("/fal-ai/animatediff-sparsectrl-lcm", json={"prompt": "a"}).status_code == 404
    assert client.get("/page/about.json").json()["endpoint"] == OTHER
    assert f"/{OTHER}" in client.get("/openapi.json").json()["paths"]
    assert service.store.waiting() == [submitted["request_id"]]
    service.store.close()


def test_a_token_is_for_the_named_apps_whichever_server_made_it(tmp_path: Path) -> None:
    names = (DEFAULT_ENDPOINT, OTHER)
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}"
    folders = (tmp_path / "one", tmp_path / "other")
    services = [
        open_service(Settings(folder, anonymous=True, database=url, endpoint=name), StandIn())
        for folder, name in zip(folders, names, strict=True)
    ]
    clients = [TestClient(create_app(service)) for service in services]

    def allowed(token: str) -> list[int]:
        """What each server answers to the token; 422 is for the missing prompt."""
        streams = [f"/{name}/stream?fal_jwt_token={token}" for name in names]
        return [client.post(path, json={}).status_code for client, path in zip(clients, streams, strict=True)]

    def token(client: TestClient, *apps: str) -> str:
        text: str = client.post("/tokens/", json={"allowed_apps": apps}).raise_for_status().json()
        return text

    for client in clients:
        assert allowed(token(client, DEFAULT_ENDPOINT)) == [422, 403]
        assert allowed(token(client, OTHER)) == allowed(token(client, "portraits")) == [403, 422]
        assert allowed(token(client, *names)) == [422, 422]
        assert client.post("/tokens/", json={"allowed_apps": [OTHER] * 1000}).status_code == 400
    for service in services:
        service.store.close()


@pytest.mark.parametrize(
    "name", ["portraits", "me/", "/me", "me/a/b", "queue/me", "files/me", "me/a b", "../me", "me/" + "a" * 300]
)
def test_names_that_cannot_be_served(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Settings(tmp_path, endpoint=name)
    assert refused.value.field == "endpoint"
