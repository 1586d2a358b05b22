"""A clock that is set, by days or by an hour: nothing is deleted, ended or held because of it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.clock import HELD_SECONDS, JUMP_SECONDS, Clock
from sparsectrl_lcm.service.objects.stored_files import keep_file, remove_expired_files
from sparsectrl_lcm.service.server import forget_what_is_old, open_service
from sparsectrl_lcm.service.settings import DAY, Settings
from sparsectrl_lcm.service.store import SqlStore

from .conftest import APP
from .stand_in import StandIn, ended, serving
from .stand_in import submit as submit_to
from .stored_requests import DONE, ids, new


class Clocks:
    """The system's two clocks. `set` sets one of them, `pass_on` lets time pass on both."""

    def __init__(self) -> None:
        self.wall, self.steady = time.time(), 1000.0
        self.shown = Clock(lambda: self.wall, lambda: self.steady)

    def set(self, seconds: float) -> None:
        self.wall += seconds

    def pass_on(self, seconds: float) -> None:
        self.wall, self.steady = self.wall + seconds, self.steady + seconds

    @property
    def ahead(self) -> float:
        return round(self.shown.now() - self.wall, 3)


@pytest.mark.parametrize("jump", [8 * DAY, -3600.0])
def test_a_jump_counts_only_if_it_lasts(jump: float, caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks()
    clocks.set(JUMP_SECONDS / 2)  # as time servers do
    assert clocks.ahead == 0
    clocks.set(jump)
    for _ in range(3):
        clocks.pass_on(HELD_SECONDS / 4)
        assert clocks.ahead == -jump
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    clocks.set(-jump)  # somebody mends it
    assert clocks.ahead == 0
    clocks.set(jump)
    assert clocks.ahead == -jump
    clocks.pass_on(HELD_SECONDS + 1)
    assert clocks.ahead == 0


def test_a_clock_that_is_set_forward_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks()
    monkeypatch.setattr(clock, "now", clocks.shown.now)
    monkeypatch.setattr(time, "time", lambda: clocks.wall)

    async def scenario() -> None:
        await submit_to(service, "ended", outcome=DONE)
        await submit_to(service, "waiting", start_by=time.time() + 60)
        clip = keep_file(service, b"1", key_id="k", name="a", content_type="video/mp4", seconds=DAY)
        for last, expected in ((False, [True, True, True]), (True, [False, False, False])):
            clocks.set(0 if last else 8 * DAY)
            clocks.pass_on(HELD_SECONDS + 1 if last else 30)
            await forget_what_is_old(service)
            await service.board.expire_waiting()
            found: list[Any] = [service.store.get("ended"), service.store.get_file(clip.id)]
            assert [*(each is not None for each in found), "waiting" in service.store.waiting(APP)] == expected

    service = open_service(Settings(tmp_path), StandIn())
    asyncio.run(scenario())
    service.store.close()


def test_a_clock_that_was_set_back_holds_no_webhook(store: SqlStore) -> None:
    """Also after a restart, when nothing tells how far it was set."""
    (name, *_) = ids()
    store.submit(new(name, webhook="http://h/"), limit=9, key_limit=9, outcome=DONE)
    (row,) = [row for row in store.due_webhooks(1e9, 60.0, 1000) if row.request_id == name]
    store.webhook_tried(row, "HTTP 500", 10_000.0)
    due = {row.request_id for row in store.due_webhooks(10_000.0 - 900.0, 60.0, 1000, most_seconds=1800.0)}
    assert name not in due
    due = {row.request_id for row in store.due_webhooks(10_000.0 - 3600.0, 60.0, 1000, most_seconds=1800.0)}
    assert name in due


def test_a_clip_of_an_attempt_that_never_ended_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process died between storing a clip and ending its request, which another attempt ends. It keeps clips."""

    async def scenario(service: Any, runner: StandIn) -> None:
        finish, left = service.store.finish, [None]

        def dies_once(*given: Any) -> Any:
            if left:
                left.pop()
                raise RuntimeError("as if the process died")
            return finish(*given)

        monkeypatch.setattr(service.store, "finish", dies_once)
        await submit_to(service, "a", object_seconds=None)
        outcome = await ended(service, "a")
        (kept,) = [outcome.body["video"]["url"].split("/")[-2]]
        folder = tmp_path / "files/objects"
        assert (outcome.status, len(list(folder.iterdir()))) == (200, 2)
        await asyncio.to_thread(remove_expired_files, service, time.time() + 2 * DAY)
        assert [path.name.rpartition("-")[0] for path in folder.iterdir()] == [kept]

    serving(tmp_path, scenario)
