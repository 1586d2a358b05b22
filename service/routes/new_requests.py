"""POST to the endpoint: submits a request, or makes a clip while the caller waits, with or without progress events."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..auth.callers import KeyId, StreamKeyId
from ..components import CurrentEndpoint, CurrentService, Endpoint, Service
from ..http.called_url import base_url, role
from ..protocol.errors import infrastructure_error
from ..protocol.request_status import preview_uri
from ..protocol.responses import EVENT_STREAM_HEADERS, PING, PING_SECONDS, Json, outcome_response, to_event
from ..protocol.urls import request_urls
from ..queue.retries import until_the_store_works
from ..queue.submission import accept
from ..queue.views import View
from ..store import Submitted


def make_router(endpoint: str) -> APIRouter:
    """Creates the routes of one endpoint."""
    router = APIRouter(prefix=f"/{endpoint}")
    router.add_api_route("", submit_or_run, methods=["POST", "GET"])
    router.add_api_route("/stream", stream, methods=["POST", "GET"])
    return router


async def submit_or_run(
    service: CurrentService, endpoint: CurrentEndpoint, key_id: KeyId, request: Request
) -> Response:
    """Submits a request or runs it, depending on port, host name or prefix."""
    if role(service.settings, request) == "run":
        return await _run(service, endpoint, request, key_id)
    new = await accept(service, endpoint, request, key_id, "queue")
    body = {"status": "IN_QUEUE", "request_id": new.id, "gateway_request_id": new.id, "queue_position": new.ahead}
    links = request_urls(base_url(service.settings, request), endpoint.name, new.id)
    return Json(body | links, headers={"X-Fal-Request-Id": new.id})


async def stream(service: CurrentService, endpoint: CurrentEndpoint, key_id: StreamKeyId, request: Request) -> Response:
    """Makes a clip and sends progress and previews as server-sent events. The last event is the result."""
    return _Stream(service, endpoint, await accept(service, endpoint, request, key_id, "run"))


async def _run(service: Service, endpoint: Endpoint, request: Request, key_id: str) -> Response:
    """Makes a clip and responds with it. The request ends with its connection."""
    new = await accept(service, endpoint, request, key_id, "run")
    disconnected = asyncio.ensure_future(_disconnected(request))
    outcome = None
    try:
        view = await _first_view(service, new)
        while (outcome := view.row.outcome) is None:
            change = asyncio.ensure_future(service.board.change(view, 1.0))
            await asyncio.wait({disconnected, change}, return_when=asyncio.FIRST_COMPLETED)
            if disconnected.done():
                change.cancel()
                break
            view = await service.board.refreshed(view)
    finally:
        disconnected.cancel()
        if outcome is None:
            await _cancel_unfinished(service, endpoint, new.id)
    if outcome is None:
        raise infrastructure_error("client_disconnected", "Client disconnected")
    return outcome_response(outcome)


class _Stream(StreamingResponse):
    """The events of a run. The request ends with its connection, even if no event was sent."""

    def __init__(self, service: Service, endpoint: Endpoint, new: Submitted) -> None:
        super().__init__(_events(service, new), media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)
        self._cancel = partial(_cancel_unfinished, service, endpoint, new.id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._cancel())


async def _events(service: Service, new: Submitted) -> AsyncIterator[bytes]:
    lines_sent, preview_sent, told_at = 0, None, time.monotonic()
    view = await _first_view(service, new)
    while view.row.outcome is None:
        changed = view.changed
        for line in view.logs[lines_sent:] if view.row.state == "running" else []:
            yield to_event({"message": line.message, **line.labels})
            lines_sent, told_at = lines_sent + 1, time.monotonic()
        if view.preview is not None and view.preview is not preview_sent:
            yield to_event({"preview": preview_uri(view.preview)})
            preview_sent, told_at = view.preview, time.monotonic()
        if not changed.is_set():
            await service.board.change(view, 1.0)
        if time.monotonic() - told_at >= PING_SECONDS:
            yield PING
            told_at = time.monotonic()
        view = await service.board.refreshed(view)
    outcome = view.row.outcome
    yield to_event(outcome.body if outcome.error is None else {"status": outcome.status, **outcome.body})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first_view(service: Service, new: Submitted) -> View:
    """Returns the view of a run that was accepted."""
    return await until_the_store_works(lambda: service.board.view(new.id, new.key_id))


async def _cancel_unfinished(service: Service, endpoint: Endpoint, request_id: str) -> None:
    """Cancels a run if it has not ended."""

    async def cancel() -> None:
        if service.draining and service.database_problem:
            return  # the next start ends all runs
        if await service.board.cancel(request_id, "client_disconnected"):
            endpoint.runner.cancel(request_id)

    await until_the_store_works(cancel)
