"""A submission that a client repeats, for want of an answer, gets the first request again."""

import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.auth.api_keys import ANONYMOUS
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import OtherInput, SqlStore
from starlette.testclient import TestClient

from .conftest import APP, Server, end_all
from .stand_in import StandIn
from .stored_requests import DONE, new


def test_a_repeated_submission_gets_the_first_request(stub: Server) -> None:
    def post(key: str = "", idempotency_key: str = "order 17", **given: Any) -> httpx.Response:
        headers = stub.headers(key or None) | {"Idempotency-Key": idempotency_key}
        return httpx.post(stub.queue, headers=headers, json={"prompt": "a", "seed": 3, **given})

    first, again = post(), post()
    assert first.json()["request_id"] == again.json()["request_id"] == again.headers["x-fal-request-id"]
    assert again.json()["status_url"] == first.json()["status_url"]
    other = post(seed=4)
    assert (other.status_code, list(other.json())) == (422, ["detail", "error_type"])
    ids = {post(key=stub.new_key()).json()["request_id"], post(idempotency_key="order 18").json()["request_id"]}
    assert len(ids | {first.json()["request_id"]}) == 3
    for wrong in ("", "x" * 256):
        assert post(idempotency_key=wrong).status_code == 400
    wrong_input = {post(idempotency_key="order 19", seed="?").json()["request_id"] for _ in range(2)}
    assert len(wrong_input) == 1


def test_a_submission_is_known_to_later_versions(tmp_path: Path) -> None:
    """The fingerprint is that of the first version, whatever reads it: SHA-256 of the input as sorted JSON."""
    given = {"seed": 3, "prompt": "a"}
    fingerprint = hashlib.sha256(b'{"prompt": "a", "seed": 3}').hexdigest()
    service = open_service(Settings(tmp_path, anonymous=True), StandIn())
    first = replace(new("r1"), key_id=ANONYMOUS, idempotency_key="order 17", fingerprint=fingerprint)
    submit(service.store, first)
    client = TestClient(create_app(service))
    answer = client.post(f"/queue/{APP}", json=given, headers={"Idempotency-Key": "order 17"})
    assert answer.json()["request_id"] == "r1"
    service.store.close()


def test_the_key_is_stored_with_the_request(store: SqlStore) -> None:
    first = replace(new(f"{time.monotonic_ns()}"), idempotency_key=f"{time.monotonic_ns()}", fingerprint="f")
    assert submit(store, first) == submit(store, replace(first, id="again")) == first.id
    with pytest.raises(OtherInput):
        submit(store, replace(first, id="again", fingerprint="g"))
    assert submit(store, replace(first, id=f"{first.id} other", key_id="other")) != first.id
    assert store.cancel(first.id, 3.0) is not None
    for outcome in (None, DONE):  # also after its end, whatever the limits are by then
        made = store.submit(replace(first, id="again"), limit=0, key_limit=0, outcome=outcome)
        assert (made.id, made.is_new) == (first.id, False)
    assert store.get("again") is None


def test_clients_that_repeat_at_once_at_several_servers(database: str, tmp_path: Path) -> None:
    name = f"{time.monotonic_ns()}"
    for url in (database, f"sqlite:///{tmp_path / 'a.sqlite3'}"):
        stores = [SqlStore(url) for _ in range(2 if url == database else 1)]
        made: list[str] = []

        def repeat(place: int, stores: list[SqlStore] = stores, made: list[str] = made) -> None:
            again = replace(new(f"{name}-{place}"), idempotency_key=name, fingerprint="f")
            made.append(submit(stores[place % len(stores)], again))

        threads = [threading.Thread(target=repeat, args=(place,)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(set(made))) == (8, 1)
        end_all(stores[0])
        for opened in stores:
            opened.close()


def submit(store: SqlStore, request: Any) -> str:
    return store.submit(request, limit=100, key_limit=100).id
