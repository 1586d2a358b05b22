"""Server-sent events of a request: every change is told once."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from sparsectrl_lcm.service.queue.views import View
from sparsectrl_lcm.service.routes import new_requests as run
from sparsectrl_lcm.service.routes import requests as queue
from sparsectrl_lcm.service.store import LogRow

from .conftest import APP
from .waiting import SECONDS


class Told:
    """A board whose request gets log lines between the events of a stream."""

    def __init__(self) -> None:
        self.shown = View(self.row("running"), [], 0.0)
        self.queue = SimpleNamespace(positions=SimpleNamespace(of=self.position))

    async def position(self, _: str) -> int:
        return 0

    def row(self, state: str) -> Any:
        outcome = SimpleNamespace(seconds=1.0, error=None, body={}) if state == "done" else None
        return SimpleNamespace(id="a", key_id="k", endpoint=APP, state=state, outcome=outcome)

    def becomes(self, state: str) -> None:
        self.shown = View(self.row(state), self.shown.logs, 0.0)

    def line(self, text: str) -> None:
        self.shown.logs.append(LogRow(text, "INFO", 0.0))
        self.shown.changed.set()

    async def refreshed(self, *_: Any) -> View:
        return self.shown

    async def change(self, *_: Any) -> None:
        await asyncio.sleep(0)


def service_of(board: Any) -> Any:
    settings = SimpleNamespace(public_url="http://x")
    return SimpleNamespace(board=board, endpoints={APP: SimpleNamespace(queue=board.queue)}, settings=settings)


def test_no_line_is_lost_or_told_twice() -> None:
    """Lines arrive while a slow reader receives an event. Then the request is tried again and keeps its old lines."""
    board = Told()
    request: Any = SimpleNamespace(query_params={"logs": "1"}, scope={})
    service = service_of(board)

    async def lines() -> list[str]:
        got: list[str] = []
        number = 0
        async for event in queue._states(service, request, board.shown):
            state = json.loads(event.removeprefix(b"data: "))
            got += [line["message"] for line in state.get("logs", [])]
            number += 1
            board.line(str(number))
            if number in (3, 4, 6):
                board.becomes({3: "queued", 4: "running", 6: "done"}[number])
        return got

    assert asyncio.run(lines()) == [str(number) for number in range(1, 7)]


def test_every_event_of_a_stream_tells_something() -> None:
    """A preview is sent once, and an unchanged state, waiting or running, is not sent again."""
    board: Any = Told()
    board.becomes("queued")
    turns = iter(["", "running", "", "picture", "", "line", "", "done"])

    async def change(*_: Any) -> None:
        match next(turns):
            case "picture":
                board.shown.preview = b"a JPEG"
            case "line":
                board.shown.logs.append(LogRow("1", "INFO", 0.0))
            case "running" | "done" as state:
                board.becomes(state)

    board.change = change
    request: Any = SimpleNamespace(query_params={"logs": "1"}, scope={})
    service = service_of(board)

    async def events() -> list[tuple[str, bool, int]]:
        told = [event async for event in queue._states(service, request, board.shown)]
        states = [json.loads(event.removeprefix(b"data: ")) for event in told]
        return [(state["status"], "preview" in state, len(state.get("logs", []))) for state in states]

    assert asyncio.run(events()) == [
        ("IN_QUEUE", False, 0),
        ("IN_PROGRESS", False, 0),
        ("IN_PROGRESS", True, 0),
        ("IN_PROGRESS", False, 1),
        ("COMPLETED", False, 0),
    ]


def test_a_stream_whose_client_has_gone_before_it_began_is_cancelled() -> None:
    left: list[str] = []

    async def cancel(request_id: str, _: str) -> bool:
        left.append(request_id)
        return False

    async def view(*_: Any) -> Any:
        await asyncio.sleep(SECONDS)

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    service: Any = SimpleNamespace(board=SimpleNamespace(cancel=cancel, view=view), draining=False)
    new: Any = SimpleNamespace(id="a", key_id="k")
    scope: Any = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(asyncio.wait_for(run._Stream(service, SimpleNamespace(), new)(scope, gone, send), SECONDS / 2))
    assert left == ["a"]


@pytest.mark.parametrize("events", ["states", "run"])
def test_a_stream_without_news_sends_pings(monkeypatch: pytest.MonkeyPatch, events: str) -> None:
    """As during an outage of the store, while the last known state stays."""
    for module in (queue, run):
        monkeypatch.setattr(module, "PING_SECONDS", 0.0)
    board: Any = Told()
    board.view = board.refreshed
    turns = iter([""] * 3 + ["done"])

    async def change(*_: Any) -> None:
        if next(turns) == "done":
            board.becomes("done")

    board.change = change
    request: Any = SimpleNamespace(query_params={}, scope={})
    service = service_of(board)
    new: Any = SimpleNamespace(id="a", key_id="k")

    async def pings() -> int:
        stream = queue._states(service, request, board.shown) if events == "states" else run._events(service, new)
        return [event async for event in stream].count(b": ping\n\n")

    assert asyncio.run(pings()) >= 3
