"""The store, on SQLite and on a real PostgreSQL."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sparsectrl_lcm.service.store import (
    Change,
    FileRow,
    LogRow,
    Outcome,
    QueueFull,
    SqlStore,
)

from .conftest import APP, started
from .holds import Hold
from .stored_requests import DONE, claimed, ids, input_of, new, outcome_of, submit
from .waiting import wait_until_it_is


def test_order_priority_and_claims(store: SqlStore) -> None:
    low, first, second = ids()
    submit(store, low, priority=1)
    submit(store, first)
    submit(store, second)
    assert store.waiting(APP) == [first, second, low]
    assert list(store.ahead(APP, 2, 2.0)) == [first, second]
    assert store.ahead(APP, 9, 2.0, [second], ["k"]) == {second: "k"}
    assert store.given(first) == (new("").input, "http://x")
    row = claimed(store)
    assert (row.id, row.state, row.owner, row.attempts, row.started_at) == (first, "running", "me", 1, 2.0)
    assert store.claim(first, "another", 2.0, 30.0) is None
    assert store.given(first) is None
    assert store.waiting(APP) == [second, low]
    assert not store.finish(replace(row, owner="another"), DONE, 3.0)
    assert store.finish(row, DONE, 3.0, [LogRow("a", "INFO", 2.5, {"x": "y"})])
    assert not store.finish(row, DONE, 3.0)
    assert outcome_of(store, first) == DONE
    assert store.counts(APP).keys() == {"queued", "running"}
    assert store.logs(first) == [LogRow("a", "INFO", 2.5, {"x": "y"})]
    assert input_of(store, first) is None


def test_only_the_try_that_is_under_way_counts(store: SqlStore) -> None:
    """A server that lost its lease must not end, or write to, a request that it claims again later."""
    a, *_ = ids()
    submit(store, a)
    old = claimed(store)
    assert store.give_back("me", [a], 3.0) == []
    assert store.give_back("me", [], 3.0) == [Change(a, APP)]
    row = claimed(store)
    assert (row.owner, row.attempts) == (old.owner, 2)
    assert not store.finish(old, DONE, 3.0)
    store.put_back(old, [LogRow("late", "INFO", 3.0)], 3.0, crashed=True)
    assert store.renew([(old, [LogRow("late", "INFO", 3.0)])], 30.0) == {a}
    assert store.logs(a) == []
    assert store.renew([(row, [LogRow("x", "INFO", 3.0)])], 30.0) == set()
    assert store.put_back(row, [], 3.0, crashed=True) is None
    again = claimed(store)
    assert (again.crashes, again.attempts) == (1, 3)
    assert store.finish(again, DONE, 3.0)


def test_lost_owners_cancels_and_limits(store: SqlStore) -> None:
    a, b, c = ids()
    submit(store, a)
    submit(store, b)
    row = claimed(store)
    if store.shared:
        assert store.give_back("another", [], 3.0) == []
        claimed_long_ago = store.put_back(row, [], 3.0, crashed=False)
        assert claimed_long_ago is None
        claimed(store, lease_seconds=-1.0)
    assert store.give_back("another", [], 3.0) == [Change(a, APP)]
    assert store.waiting(APP) == [a, b]
    assert store.cancel(b, 4.0) == Change(b, APP, 499)
    assert store.cancel(b, 4.0) is None
    row = claimed(store)
    assert store.cancel(a, 4.0) == Change(a, APP)
    assert store.cancel(a, 4.0) is None
    assert store.renew([(row, [])], 30.0) == {a}
    assert store.give_back("me", [], 6.0) == [Change(a, APP, 499)]
    assert outcome_of(store, a).status == 499
    submit(store, c, start_by=10.0)
    with pytest.raises(QueueFull):
        store.submit(new("x"), limit=1, key_limit=9)
    with pytest.raises(QueueFull):
        store.submit(new("x"), limit=9, key_limit=1)
    assert store.ahead(APP, 9, 11.0) == {}
    assert store.claim(c, "me", 11.0, 1.0) is None
    assert store.expire_waiting(11.0) == [Change(c, APP, 504)]


def test_a_cancelled_request_whose_runner_dies_ends(store: SqlStore) -> None:
    a, *_ = ids()
    submit(store, a)
    row = claimed(store)
    store.cancel(a, 3.0)
    assert store.put_back(row, [], 4.0, crashed=True) == 499
    assert outcome_of(store, a).status == 499


def test_a_request_that_takes_servers_down_ends(store: SqlStore) -> None:
    a, *_ = ids()
    submit(store, a, webhook="http://h")
    for _ in range(9):
        claimed(store)
        assert store.give_back("me", [], 3.0) == [Change(a, APP)]
    claimed(store)
    assert store.give_back("me", [], 3.0) == [Change(a, APP, 500)]
    assert outcome_of(store, a).error_type == "runner_server_error"
    assert a in [row.request_id for row in store.due_webhooks(1e9, 1e9, 1000)]


def test_runs_end_with_their_server(store: SqlStore) -> None:
    a, b, c = ids()
    submit(store, a, kind="run", home="me")
    submit(store, b, home="me")
    submit(store, c, kind="run", home="another")
    claimed(store)  # it ran when the server died
    store.give_back("me", [], 3.0)
    assert store.end_runs("me", 4.0) == [Change(name, APP, 499) for name in ([a] if store.shared else [a, c])]
    assert (outcome_of(store, a).status, outcome_of(store, a).error_type) == (499, "client_disconnected")
    assert b in store.waiting(APP)


def test_what_came_to_nothing_is_bounded_per_key(store: SqlStore) -> None:
    a, b, c = ids()
    limits = {"limit": 9, "key_limit": 9, "unstarted_limit": 2}
    wrong, key = Outcome(422, {}, "x"), a
    store.submit(new(a, key_id=key), **limits, outcome=wrong)
    assert input_of(store, a) is None
    store.submit(new(b, key_id=key), **limits)
    store.cancel(b, 2.0)
    for outcome in (wrong, None):
        with pytest.raises(QueueFull, match="without a start"):
            store.submit(new(c, key_id=key), **limits, outcome=outcome)
    store.submit(new(c, key_id=key, created_at=3602.0), **limits)
    store.submit(new(f"{c}x", key_id=c), **limits)


def test_webhooks_and_forgetting(store: SqlStore) -> None:
    a, b, _ = ids()
    store.submit(new(a, webhook="http://h", keep_io=False), limit=9, key_limit=9, outcome=DONE)
    store.submit(new(b), limit=9, key_limit=9, outcome=DONE)
    (first,) = (row for row in store.due_webhooks(2.0, 60.0) if row.request_id == a)
    assert (first.url, first.attempt) == ("http://h", 1)
    assert a not in [row.request_id for row in store.due_webhooks(3.0, 60.0)]
    assert a not in [row.request_id for row in store.due_webhooks(63.0, 60.0, under_way=[first])]
    store.webhook_tried(first, "HTTP 500", 4.0)
    (second,) = (row for row in store.due_webhooks(5.0, 60.0) if row.request_id == a)
    assert second.attempt == 2
    store.webhook_tried(first, None, None)  # too late
    (third,) = (row for row in store.due_webhooks(66.0, 60.0) if row.request_id == a)  # the second was interrupted
    assert third.attempt == 3
    store.webhook_tried(third, None, None)
    assert a not in [row.request_id for row in store.due_webhooks(1e9, 60.0)]
    assert a in store.forget(0.5, 2.0)
    assert store.get(a) is None
    assert b in store.forget(2.0, 2.0)


def test_each_request_is_claimed_once(store: SqlStore) -> None:
    names = [f"{time.monotonic_ns()}-{place}" for place in range(40)]
    for name in names:
        submit(store, name)
    taken: list[str] = []

    def take(owner: str) -> None:
        while request_ids := store.ahead(APP, 3, 2.0):
            for request_id in request_ids:
                if store.claim(request_id, owner, 2.0, 30.0) is not None:
                    taken.append(request_id)

    threads = [threading.Thread(target=take, args=(f"owner {place}",)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(names)
    for place in range(4):
        store.give_back(f"owner {place}", [], 3.0)


def file(object_name: str) -> FileRow:
    return FileRow("f", "k", "a.png", "image/png", 1, object_name, 1.0, None)


def test_every_replaced_file_is_told_once(store: SqlStore) -> None:
    """The caller that replaces a row deletes its object, so that concurrent uploads leave one object."""
    store.delete_file("f")
    replaced: list[FileRow | None] = []
    names = [f"objects/f-{place}" for place in range(8)]
    threads = [threading.Thread(target=lambda name=name: replaced.append(store.add_file(file(name)))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = store.get_file("f")
    assert kept is not None
    gone = [row.object_name for row in replaced if row is not None]
    assert sorted([*gone, kept.object_name]) == names


def test_parts_are_bounded_together(store: SqlStore) -> None:
    every = [f"{ids()[0]}.{number}" for number in (1, 2, 3)]
    rows = [replace(file("parts/x"), id=part_id, size=4) for part_id in every]
    assert [store.add_part(row, every, 10) for row in rows] == [True, True, False]
    assert store.add_part(rows[1], every, 10)
    assert store.add_part(replace(rows[0], size=1), every, 10)
    assert store.add_part(rows[2], every, 10)


def test_a_host_that_is_busy_gets_no_more(store: SqlStore) -> None:
    names = ids()
    for name, url in zip(names, ("http://slow:1/x", "http://SLOW/y", "http://fast/"), strict=True):
        store.submit(new(name, webhook=url), limit=9, key_limit=9, outcome=DONE)
    due = store.due_webhooks(1e9, 60.0, 1000, ["slow"])
    assert {"slow"} & {row.host for row in due} == set()
    assert names[2] in [row.request_id for row in due]
    assert {"slow"} <= {row.host for row in store.due_webhooks(1e9, 60.0, 1000)}


def test_only_the_owner_reads_the_database(tmp_path: Path) -> None:
    store = SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    submit(store, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.sqlite3", "a.sqlite3-shm", "a.sqlite3-wal"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    store.close()


def test_secrets_stay(store: SqlStore) -> None:
    assert store.secret("a") == store.secret("a") != store.secret("b")
    assert len(store.secret("a")) == 32


def test_a_server_on_postgresql(database: str, tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load", database=database):
        with httpx.Client(headers=server.headers(), timeout=30) as client:
            request_id = client.post(server.queue, json={"prompt": "slow 0.1", "seed": 5}).json()["request_id"]
            url = f"{server.queue}/requests/{request_id}"
            wait_until_it_is("COMPLETED", client, url)
            assert client.get(url).json()["seed"] == 5
            lines = [line["message"] for line in client.get(url + "/status?logs=1").json()["logs"]]
            assert "denoise 4/4" in lines


def test_another_server_takes_over(database: str, tmp_path: Path, hold: Hold) -> None:
    options = {"pipeline": "stub_pipeline:load", "database": database, "lease_seconds": 2.0}
    for first in started(tmp_path / "first", **options):
        with httpx.Client(headers=first.headers(), timeout=30) as client:
            request_id = client.post(first.queue, json={"prompt": hold.prompt, "seed": 6}).json()["request_id"]
            wait_until_it_is("IN_PROGRESS", client, f"{first.queue}/requests/{request_id}")
        first.kill()
        hold.let_go()
        for second in started(tmp_path / "second", **options):
            with httpx.Client(headers=first.headers(), timeout=30) as client:
                url = f"{second.queue}/requests/{request_id}"
                wait_until_it_is("COMPLETED", client, url)
                assert client.get(url).json()["seed"] == 6
