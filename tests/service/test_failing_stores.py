"""The ends of requests while the database or the object store fails, or changes meanwhile."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.queue import retries

from .stand_in import StandIn, counted, ended, failing, serving, submit
from .waiting import SECONDS

pytestmark = pytest.mark.usefixtures("soon")


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("name", ["claim", "finish", "put_back", "given", "ahead", "renew", "give_back"])
def test_a_store_that_fails_strands_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, committed: bool
) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        failing(monkeypatch, service.store, name, 3, committed=committed)
        runner.lose = name == "put_back"
        again = retries.until_the_store_works
        for request_id in "ab":
            await again(lambda request_id=request_id: submit(service, request_id))
        for request_id in "ab":
            assert (await again(lambda request_id=request_id: ended(service, request_id))).status == 200
        if name != "finish" or not committed:  # otherwise the end was committed but not reported, so it is not counted
            assert counted(service) == {"200": 2}

    serving(tmp_path, scenario)


def test_an_error_that_is_not_the_stores_ends_in_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        finish, left = service.store.finish, [2]

        def broken(*arguments: Any) -> bool:
            if left[0]:
                left[0] -= 1
                raise ValueError("a surprise")
            return finish(*arguments)

        monkeypatch.setattr(service.store, "finish", broken)
        await submit(service, "a")
        assert (await ended(service, "a")).status == 200

    serving(tmp_path, scenario)


def test_what_was_cancelled_as_its_clip_was_stored_ends_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        loop = asyncio.get_running_loop()
        put = service.files.put

        def cancelled_meanwhile(*given: Any) -> int:
            assert asyncio.run_coroutine_threadsafe(service.board.cancel("a"), loop).result(SECONDS)
            return put(*given)

        monkeypatch.setattr(service.files, "put", cancelled_meanwhile)
        await submit(service, "a")
        outcome = await ended(service, "a")
        assert (outcome.status, outcome.error_type) == (499, "client_cancelled")
        assert counted(service) == {"499": 1}

    serving(tmp_path, scenario)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("the object store is away"),
    ],
    ids=["full", "objects"],
)
def test_a_clip_is_stored_once_the_object_store_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    async def scenario(service: Service, runner: StandIn) -> None:
        real, left = service.files.put, [3]

        def fails(*given: Any, **named: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise failure
            return real(*given, **named)

        monkeypatch.setattr(service.files, "put", fails)
        await submit(service, "a")
        outcome = await ended(service, "a")
        assert (outcome.status, left, runner.order) == (200, [0], ["a"])  # and the clip is made once
        objects = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
        assert [path.read_bytes() for path in objects] == [b"clip"]

    serving(tmp_path, scenario)
