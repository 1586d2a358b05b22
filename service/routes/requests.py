"""A request in the queue: its status, its states as events, its result, and its cancellation."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from ..auth.callers import KeyId
from ..components import CurrentEndpoint, CurrentService, Service
from ..http.called_url import base_url
from ..protocol.errors import ServiceError, not_found
from ..protocol.request_status import WANTS_LOGS, preview_uri, status_of
from ..protocol.responses import EVENT_STREAM_HEADERS, PING, PING_SECONDS, Json, outcome_response, to_event
from ..protocol.urls import request_urls
from ..queue.views import View


def make_router(endpoint: str) -> APIRouter:
    """Creates the routes for the requests of one endpoint."""
    router = APIRouter(prefix=f"/{endpoint}/requests/{{request_id}}")
    for path, route, method in (
        ("", result, "GET"),
        ("/response", result, "GET"),
        ("/status", status, "GET"),
        ("/status/stream", status_stream, "GET"),
        ("/cancel", cancel, "PUT"),
    ):
        router.add_api_route(path, route, methods=[method])
    return router


async def _own_request(service: CurrentService, endpoint: CurrentEndpoint, key_id: KeyId, request_id: str) -> View:
    """Returns the caller's request of the endpoint in the path.

    Checks the key first, since people test keys with the status of a random id.
    """
    if len(request_id) > 64 or not request_id.isascii() or not request_id.isprintable():
        raise not_found()
    view = await service.board.view(request_id, key_id)
    if view.row.endpoint != endpoint.name:
        raise not_found()
    return view


OwnRequest = Annotated[View, Depends(_own_request)]


async def status(service: CurrentService, view: OwnRequest, request: Request) -> Response:
    """Returns the state of the request."""
    code, body = await _status(service, request, view, 0 if _wants_logs(request) else None)
    return Json(body, code)


async def status_stream(service: CurrentService, view: OwnRequest, request: Request) -> Response:
    """Sends the request's states as server-sent events when they change, each with the new log lines."""
    events = _states(service, request, view)
    return StreamingResponse(events, media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)


async def result(view: OwnRequest) -> Response:
    """Returns the clip, or the error that ended the request."""
    outcome = view.row.outcome
    if outcome is None:
        raise ServiceError(400, "Request is still in progress", "bad_request")
    return outcome_response(outcome)


async def cancel(service: CurrentService, endpoint: CurrentEndpoint, view: OwnRequest) -> Response:
    """Ends a waiting request at once, and a running one at its next step."""
    if not await service.board.cancel(view.row.id):
        return Json({"status": "ALREADY_COMPLETED"}, 400)
    endpoint.runner.cancel(view.row.id)
    return Json({"status": "CANCELLATION_REQUESTED"}, 202)


async def _status(service: Service, request: Request, view: View, logs_from: int | None) -> tuple[int, dict[str, Any]]:
    row = view.row
    position = await service.endpoints[row.endpoint].queue.positions.of(row.id) if row.state == "queued" else 0
    links = request_urls(base_url(service.settings, request), row.endpoint, row.id)
    return status_of(row, view.logs, links, position, logs_from)


async def _states(service: Service, request: Request, view: View) -> AsyncIterator[bytes]:
    lines_sent, preview_sent = 0, None
    last_state: dict[str, Any] = {}
    with_logs = _wants_logs(request)
    told_at = time.monotonic()
    while True:
        changed = view.changed
        _, body = await _status(service, request, view, lines_sent if with_logs else None)
        lines_sent += len(body.get("logs") or ())  # before sending: lines that arrive meanwhile are for the next event
        state = {name: value for name, value in body.items() if name != "logs"}
        if view.preview is not None and view.preview is not preview_sent and view.row.state == "running":
            body["preview"] = preview_uri(view.preview)
            preview_sent = view.preview
        if state != last_state or body.get("logs") or "preview" in body:
            yield to_event(body)
            last_state, told_at = state, time.monotonic()
        elif time.monotonic() - told_at >= PING_SECONDS:
            yield PING
            told_at = time.monotonic()
        if view.row.state == "done":
            return
        if not changed.is_set():
            await service.board.change(view, 1.0)
        view = await service.board.refreshed(view)


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs") in WANTS_LOGS
