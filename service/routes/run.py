"""Synchronous runs and streams of events; they end with the connection that waits for them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..answers import PING, PING_SECONDS, SSE_HEADERS, answer_of, to_json
from ..context import Service
from ..errors import infrastructure_error
from ..status import preview_uri
from ..store import NewRequest
from ..submission import accept
from .tokens import caller


def make_router(endpoint: str) -> APIRouter:
    """The stream of one endpoint; runs share their route with submissions."""
    router = APIRouter(prefix=f"/{endpoint}")
    router.add_api_route("/stream", stream, methods=["POST", "GET"])
    return router


async def run(service: Service, request: Request, key_id: str) -> Response:
    """Makes a clip and answers with it."""
    new = await accept(service, request, key_id, "run")
    gone = asyncio.ensure_future(_gone(request))
    try:
        view = await service.board.view(new.id, key_id)
        while view.row.outcome is None:
            change = asyncio.ensure_future(service.board.change(view, 1.0))
            await asyncio.wait({gone, change}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                change.cancel()
                break
            view = await service.board.view(new.id, key_id)
    finally:
        gone.cancel()
        await _leave(service, new.id)
    outcome = view.row.outcome
    if outcome is None:
        raise infrastructure_error("client_disconnected", "Client disconnected")
    return answer_of(outcome)


async def stream(request: Request) -> Response:
    """Makes a clip and tells its progress with pictures as server-sent events; the last one is the result."""
    service: Service = request.app.state.service
    new = await accept(service, request, await caller(request), "run")
    return _Stream(service, new)


class _Stream(StreamingResponse):
    """The events of a run, which ends with them even where they have not begun."""

    def __init__(self, service: Service, new: NewRequest) -> None:
        super().__init__(_events(service, new), media_type="text/event-stream", headers=SSE_HEADERS)
        self._service, self._id = service, new.id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(_leave(self._service, self._id))


async def _events(service: Service, new: NewRequest) -> AsyncIterator[bytes]:
    told, shown, quiet = 0, None, 0
    view = await service.board.view(new.id, new.key_id)
    while view.row.outcome is None:
        changed = view.changed
        for line in view.logs[told:] if view.row.state == "running" else []:
            yield _event({"message": line.message, **line.labels})
            told, quiet = told + 1, 0
        if view.preview is not None and view.preview is not shown:
            yield _event({"preview": preview_uri(view)})
            shown, quiet = view.preview, 0
        if not changed.is_set():
            await service.board.change(view, 1.0)
            quiet += 1
        if quiet > PING_SECONDS:
            yield PING
            quiet = 0
        view = await service.board.view(view.row.id, view.row.key_id)
    outcome = view.row.outcome
    yield _event(outcome.body if outcome.error is None else {"status": outcome.status, **outcome.body})


def _event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _leave(service: Service, request_id: str) -> None:
    if await service.board.cancel(request_id, "client_disconnected"):  # False where it has ended
        service.runner.cancel(request_id)
