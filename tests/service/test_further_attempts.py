"""What happens to a request whose runner dies, and that its state outlives a loss of power."""

import time
from pathlib import Path

import httpx
import pytest
from sparsectrl_lcm.service.store import Change, NewRequest, SqlStore

from .conftest import APP, Server
from .waiting import SECONDS


@pytest.mark.parametrize(("header", "attempts"), [(None, 2), ("1", 1), ("TRUE", 1), ("0", 2)])
def test_a_request_is_made_again_unless_its_caller_does_not_want_that(
    stub: Server, header: str | None, attempts: int
) -> None:
    """Each attempt leaves a line in the request's log."""
    headers = {} if header is None else {"X-Fal-No-Retry": header}
    with httpx.Client(headers=stub.headers(), timeout=30) as client:
        made = client.post(stub.queue, json={"prompt": "crash"}, headers=headers).json()
        end = time.monotonic() + SECONDS
        while (state := client.get(made["status_url"], params={"logs": "1"})).status_code == 202:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.get(made["response_url"]).status_code == 500
    lost = [line for line in state.json()["logs"] if line["message"].startswith("The runner was lost")]
    assert len(lost) == attempts


def test_only_the_first_start_has_a_deadline(tmp_path: Path) -> None:
    """A request that started in time and lost its runner waits for another start as long as it takes."""
    store = SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    for request_id in ("lost", "late"):
        request = NewRequest(request_id, "k", APP, {}, 1.0, "http://x", start_by=10.0)
        store.submit(request, limit=9, key_limit=9)
    taken = store.claim("lost", "me", 2.0, 30.0)
    assert taken is not None
    store.put_back(taken[0], [], 3.0, crashed=True)
    assert store.expire_waiting(11.0) == [Change("late", APP, 504)]
    assert store.claim("lost", "me", 12.0, 30.0) is not None
    store.close()


def test_sqlite_writes_to_the_disk_before_it_answers(tmp_path: Path) -> None:
    """2 is FULL in SQLite's documentation: a transaction survives a loss of power once it has been committed."""
    store = SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    for _ in range(2):
        with store.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()
