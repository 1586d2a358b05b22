"""Several bundles on one database, in one server or in several: each endpoint has a queue of its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.runtime.errors import InvalidRequest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import DEFAULT_ENDPOINT, Settings
from sparsectrl_lcm.service.store import Change, NewRequest, SqlStore, tables
from starlette.testclient import TestClient

from .conftest import started
from .stand_in import StandIn

OTHER = "me/portraits"


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    """A store without requests, before and after."""
    shared = request.param == "postgresql"
    opened = SqlStore(request.getfixturevalue("database") if shared else f"sqlite:///{tmp_path / 'a.sqlite3'}")
    clear(opened)
    yield opened
    clear(opened)
    opened.close()


def clear(store: SqlStore) -> None:
    with store.engine.begin() as connection:
        connection.execute(tables.requests.delete())


def submit(store: SqlStore, endpoint: str, *names: str) -> list[int]:
    """Submits requests whose key is the first letter of the name; returns how many wait ahead of each."""
    new = [NewRequest(name, name[0], endpoint, {"prompt": name}, 1.0, "http://x") for name in names]
    return [store.submit(each, limit=100, key_limit=100).ahead for each in new]


def test_each_endpoint_has_a_queue(store: SqlStore) -> None:
    assert submit(store, DEFAULT_ENDPOINT, "a1", "a2", "b1") == [0, 1, 1]
    assert submit(store, OTHER, "a3", "b2", "a4") == [0, 1, 2]
    assert store.waiting(DEFAULT_ENDPOINT) == ["a1", "b1", "a2"]
    assert list(store.ahead(OTHER, 9, 2.0)) == ["a3", "b2", "a4"]
    assert (store.counts(DEFAULT_ENDPOINT), store.counts(OTHER)) == ({"queued": 3, "running": 0},) * 2
    assert store.claim("a3", "server", 2.0, 30.0) is not None
    assert (store.counts(DEFAULT_ENDPOINT)["running"], store.counts(OTHER)) == (0, {"queued": 2, "running": 1})
    assert submit(store, DEFAULT_ENDPOINT, "c1") == [2]  # the turn that runs is that of its own queue


def test_a_cancelled_request_moves_only_those_of_its_queue(store: SqlStore) -> None:
    submit(store, DEFAULT_ENDPOINT, "a1", "a2", "b1", "b2")
    submit(store, OTHER, "a3", "a4", "b3", "b4")
    assert store.cancel("a1", 2.0) == Change("a1", DEFAULT_ENDPOINT, 499)
    assert store.waiting(DEFAULT_ENDPOINT) == ["a2", "b1", "b2"]
    assert store.waiting(OTHER) == ["a3", "b3", "a4", "b4"]


def test_endpoints_may_be_given_the_same_idempotency_key(store: SqlStore) -> None:
    for name, endpoint, given in (("r1", DEFAULT_ENDPOINT, "f"), ("r2", OTHER, "g")):
        named = {"idempotency_key": "order 17", "fingerprint": given}
        new = NewRequest(name, "k", endpoint, {}, 1.0, "http://x", **named)
        for again in (new, replace(new, id="again")):
            assert store.submit(again, limit=100, key_limit=100).id == name


def test_servers_with_different_bundles_share_keys_and_files(database: str, tmp_path: Path) -> None:
    common = {"pipeline": "stub_pipeline:load", "database": database, "files": str(tmp_path / "files")}
    for one in started(tmp_path / "one", **common):
        for other in started(tmp_path / "other", endpoints={OTHER: None}, **common):
            urls = {}
            for server, name in ((one, DEFAULT_ENDPOINT), (other, OTHER)):
                answer = httpx.post(f"{server.url}/{name}", json={"prompt": "a"}, headers=one.headers(), timeout=60)
                urls[server.port] = answer.raise_for_status().json()["video"]["url"]
            from_one = urls[other.port].replace(other.url, one.url)
            assert httpx.get(from_one).content == httpx.get(urls[other.port]).raise_for_status().content
            assert httpx.post(f"{one.url}/{OTHER}", json={"prompt": "a"}, headers=one.headers()).status_code == 404


def test_the_name_is_in_the_paths_the_page_and_the_schema(tmp_path: Path) -> None:
    service = open_service(Settings(tmp_path, anonymous=True, endpoints={OTHER: None}), StandIn())
    client = TestClient(create_app(service))
    submitted: dict[str, Any] = client.post(f"/queue/{OTHER}", json={"prompt": "a"}).raise_for_status().json()
    assert submitted["status_url"].startswith(f"http://testserver/queue/{OTHER}/requests/")
    assert client.get(submitted["status_url"]).json()["status"] == "IN_QUEUE"
    assert client.post("/fal-ai/animatediff-sparsectrl-lcm", json={"prompt": "a"}).status_code == 404
    assert [each["name"] for each in client.get("/page/about.json").json()["endpoints"]] == [OTHER]
    assert f"/{OTHER}" in client.get("/openapi.json").json()["paths"]
    assert service.store.waiting(OTHER) == [submitted["request_id"]]
    service.store.close()


def test_a_token_is_for_the_named_apps_whichever_server_made_it(tmp_path: Path) -> None:
    names = (DEFAULT_ENDPOINT, OTHER)
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}"
    folders = (tmp_path / "one", tmp_path / "other")
    services = [
        open_service(Settings(folder, anonymous=True, database=url, endpoints={name: None}), StandIn())
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
        Settings(tmp_path, endpoints={name: None})
    assert refused.value.field == "endpoint"
