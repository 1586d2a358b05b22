"""The order of the queue: keys take turns, no key starves, and a long queue costs a submission nothing."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.auth.api_keys import create_key
from sparsectrl_lcm.service.server import open_service, running
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import Change, Outcome, RequestRow, SqlStore, Submitted
from sqlalchemy import event

from .conftest import APP
from .stand_in import StandIn
from .stand_in import submit as submit_to
from .stored_requests import new, outcome_of
from .waiting import SECONDS


@pytest.fixture
def queue(store: SqlStore) -> Iterator["Queue"]:
    made = Queue(store)
    yield made
    made.wait_again()
    for request_id in store.waiting(APP):
        store.cancel(request_id, 9.0)


class Queue:
    """The store with keys and requests named in short: `a1` is the first request of the key `a`."""

    def __init__(self, store: SqlStore) -> None:
        self.store = store
        self._mark = f"{time.monotonic_ns()}-"
        self._running: dict[str, RequestRow] = {}

    def add(self, *names: str, **values: Any) -> list[int]:
        return [self.submit(name, **values).ahead for name in names]

    def submit(self, name: str, **values: Any) -> Submitted:
        request = new(self._mark + name, key_id=self._mark + name[0], **values)
        return self.store.submit(request, limit=20_000, key_limit=20_000)

    def waiting(self) -> str:
        return " ".join(name.removeprefix(self._mark) for name in self.store.waiting(APP))

    def begin(self, name: str | None = None) -> str:
        first = next(iter(self.store.ahead(APP, 1, 2.0))) if name is None else self._mark + name
        claimed = self.store.claim(first, self._mark, 2.0, 30.0)
        assert claimed is not None
        self._running[first.removeprefix(self._mark)] = claimed[0]
        return first.removeprefix(self._mark)

    def end(self, *names: str) -> None:
        for name in names:
            assert self.store.finish(self._running.pop(name), Outcome(200, {}), 3.0) == 200

    def wait_again(self) -> None:
        self.store.give_back(self._mark, [], 4.0)

    def cancel(self, *names: str) -> None:
        for name in names:
            assert self.store.cancel(self._mark + name, 3.0) == Change(self._mark + name, APP, 499)


def test_keys_take_turns(queue: Queue) -> None:
    assert queue.add("a1", "a2", "a3", "a4") == [0, 1, 2, 3]
    assert queue.add("b1", "b2", "c1") == [1, 3, 2]
    assert queue.waiting() == "a1 b1 c1 a2 b2 a3 a4"
    assert queue.add("d1", priority=1) == [7]  # priority counts first
    assert [queue.begin() for _ in range(8)] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4", "d1"]
    assert queue.add("e1", "a5") == [0, 1]


def test_no_key_starves(queue: Queue) -> None:
    """Two keys that always have requests waiting, one of them many more, begin equally many."""
    queue.add(*(f"a{number}" for number in range(40)))
    queue.add("b0", "b1")
    begun = []
    for number in range(20):
        queue.add(f"b{number + 2}", f"a{number + 40}")
        begun.append(queue.begin()[0])
    assert abs(begun.count("a") - begun.count("b")) <= 2
    queue.add("c1")  # comes late, after many turns
    assert "c1" in [queue.begin() for _ in range(3)]


def test_a_new_key_gains_no_turn_by_a_request_that_runs_for_long(queue: Queue) -> None:
    """The first request hangs in its runner, while another runner goes on: a new key begins where the others are."""
    queue.add(*(f"a{number}" for number in range(20)))
    assert [queue.begin() for _ in range(10)][-1] == "a9"
    for number in range(1, 9):
        row = queue.store.get(queue._mark + f"a{number}")
        assert row is not None and queue.store.finish(row, Outcome(200, {}), 3.0) == 200
    queue.add(*(f"b{number}" for number in range(4)))
    assert queue.waiting().split()[:6] == ["b0", "a10", "b1", "a11", "b2", "a12"]


@pytest.mark.parametrize("state", ["slow to prepare", "slow to make"])
def test_a_slow_request_lets_no_new_key_pass_the_others(queue: Queue, state: str) -> None:
    """`s1` stays at the first turn, while `a` has many. A burst of a new key then takes turns with `a`."""
    queue.add("s1", *(f"a{number}" for number in range(20)))
    if state == "slow to make":
        assert queue.begin() == "s1"
    for number in range(10):
        queue.begin(f"a{number}")
    queue.end(*(f"a{number}" for number in range(9)))
    queue.add(*(f"b{number}" for number in range(20)))
    assert queue.waiting().removeprefix("s1 ").split()[:6] == ["b0", "a10", "b1", "a11", "b2", "a12"]


def test_a_key_loses_no_turn_by_cancelling_or_lateness(queue: Queue) -> None:
    queue.add("a0", "a1", start_by=5.0)
    queue.add(*(f"a{number}" for number in range(2, 30)))
    queue.add(*(f"b{number}" for number in range(30)))
    queue.cancel(*(f"a{number}" for number in range(2, 28)))
    assert queue.waiting().split()[:8] == ["a0", "b0", "a1", "b1", "a28", "b2", "a29", "b3"]
    assert len(queue.store.expire_waiting(6.0)) == 2
    assert queue.waiting().split()[:4] == ["a28", "b0", "a29", "b1"]


def test_a_request_that_waits_again_keeps_its_place(queue: Queue) -> None:
    queue.add("a1", "a2", "a3")
    assert queue.begin() == "a1"
    queue.add("b1")
    queue.wait_again()
    assert queue.waiting() == "a1 b1 a2 a3"


def test_requests_of_a_revoked_key_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        key_id = create_key(service.store, "gone").partition(":")[0]
        runner.capacity = 0
        async with running(service):
            await submit_to(service, "theirs", key_id=key_id)
            await submit_to(service, "other")
            view = await service.board.view("theirs", key_id)
            changed = view.changed
            assert await service.store.write(service.store.revoke_key, key_id, time.time())
            await asyncio.wait_for(changed.wait(), SECONDS)  # who waits for it, such as a stream, is told
        outcome = outcome_of(service.store, "theirs")
        assert (outcome.status, outcome.error) == (401, "The API key of this request was revoked")
        assert service.store.waiting(APP) == ["other"]

    runner = StandIn()
    service = open_service(Settings(tmp_path), runner)
    asyncio.run(scenario())


def test_a_long_queue_is_not_read_for_each_submission(tmp_path: Path) -> None:
    """Each query finds what it needs in an index, and none returns more than its caller asked for."""
    opened = SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    queue = Queue(opened)
    queue.add(*(f"{'abc'[number % 3]}{number}" for number in range(60)))
    queries: list[tuple[str, Any]] = []
    event.listen(opened.engine, "before_cursor_execute", lambda *given: queries.append((given[2], given[3])))
    assert queue.add("d0") == [3]
    opened.ahead(APP, 3, 2.0)
    with opened.engine.connect() as connection:
        for query, values in [given for given in queries if given[0].startswith("SELECT")]:
            plan = [step[3] for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values)]
            assert not any(step.startswith("SCAN requests") or "TEMP B-TREE" in step for step in plan), (query, plan)
    opened.close()


def test_a_submission_reads_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = open_service(Settings(tmp_path, anonymous=True), StandIn())
    monkeypatch.setattr(service.store, "waiting", None)

    async def scenario() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://x") as client:
            made = [await client.post(f"/queue/{APP}", json={"prompt": "a"}) for _ in range(3)]
        return [answer.json()["queue_position"] for answer in made]

    assert asyncio.run(scenario()) == [0, 1, 2]
    service.store.close()
