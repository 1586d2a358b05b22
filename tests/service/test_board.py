"""The board alone: views that change while they are read, and lines of logs."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service.metrics import Metrics
from sparsectrl_lcm.service.queue.request_states import Board
from sparsectrl_lcm.service.queue.views import View
from sparsectrl_lcm.service.store import Outcome, SqlStore

from .conftest import APP
from .stand_in import new
from .waiting import SECONDS


@pytest.fixture
def store(tmp_path: Path) -> SqlStore:
    return SqlStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")


def boarding(store: SqlStore, scenario: Callable[[Board], Awaitable[None]]) -> None:
    async def main() -> None:
        board = Board(store, "me", Metrics(), [APP])
        async with asyncio.timeout(SECONDS):
            await scenario(board)

    store.submit(new("a"), limit=9, key_limit=9)
    asyncio.run(main())
    store.close()


def test_a_change_while_a_view_is_loaded_is_seen(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = store.logs

    async def scenario(board: Board) -> None:
        loop, calls = asyncio.get_running_loop(), []

        def slow(request_id: str) -> Any:
            if not calls:
                calls.append(asyncio.run_coroutine_threadsafe(board.cancel("a"), loop).result())
            return logs(request_id)

        monkeypatch.setattr(store, "logs", slow)
        assert (await board.view("a", "k")).row.state == "done"
        known = board.known("a")
        assert known is not None and known.row.state == "done"

    boarding(store, scenario)


def test_lines_of_logs_are_written_once(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, begun, go_on = store.renew, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        go_on.wait()
        return renew(*arguments)

    async def scenario(board: Board) -> None:
        view = await board.claim("a", 30.0)
        assert isinstance(view, View)
        for line in ("one", "two"):
            board.log(view, line)
        renewing = asyncio.create_task(board.renew(30.0))
        await asyncio.to_thread(begun.wait)
        board.log(view, "three")
        finishing = asyncio.create_task(board.finish(view, Outcome(200, {})))
        await asyncio.sleep(0.05)
        go_on.set()
        assert (await renewing, await finishing) == ([], 200)
        assert [line.message for line in store.logs("a")] == ["one", "two", "three"]
        assert not await board.finish(view, Outcome(200, {}))

    monkeypatch.setattr(store, "renew", slow)
    boarding(store, scenario)
