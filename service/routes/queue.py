"""The queue: submit, status, stream of states, result, cancel. A POST to the endpoint may be a run, too."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from ..answers import PING, PING_SECONDS, SSE_HEADERS, Json, answer_of, to_json
from ..board import View
from ..context import Service
from ..errors import ServiceError, not_found
from ..status import WANTS_LOGS, preview_uri, status_of, urls
from ..submission import accept
from .run import run


def make_router(endpoint: str) -> APIRouter:
    """The routes of one endpoint."""
    router = APIRouter(prefix=f"/{endpoint}")
    router.add_api_route("", submit_or_run, methods=["POST", "GET"])
    for path, route, method in (
        ("", result, "GET"),
        ("/response", result, "GET"),
        ("/status", status, "GET"),
        ("/status/stream", status_stream, "GET"),
        ("/cancel", cancel, "PUT"),
    ):
        router.add_api_route("/requests/{request_id}" + path, route, methods=[method])
    return router


async def submit_or_run(request: Request) -> Response:
    """Puts a clip into the queue, or makes it while the caller waits: by port, host name or prefix."""
    service: Service = request.app.state.service
    key_id = await service.authenticate(request)
    if service.role(request) == "run":
        return await run(service, request, key_id)
    new = await accept(service, request, key_id, "queue")
    position = await service.board.queue_position(new.id)
    body = {"status": "IN_QUEUE", "request_id": new.id, "gateway_request_id": new.id, "queue_position": position}
    return Json(body | urls(service.base_url(request), service.settings.endpoint, new.id))


async def status(request: Request, request_id: str) -> Response:
    """How far a request is."""
    service, view = await _view(request, request_id)
    code, body = await _status(service, request, view, 0 if _wants_logs(request) else None)
    return Json(body, code)


async def status_stream(request: Request, request_id: str) -> Response:
    """Its states as they change, as server-sent events; each has the lines of the log that are new."""
    service, view = await _view(request, request_id)
    events = _states(service, request, view)
    return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)


async def result(request: Request, request_id: str) -> Response:
    """What the model gave, or the error it ended with."""
    _, view = await _view(request, request_id)
    outcome = view.row.outcome
    if outcome is None:
        raise ServiceError(400, "Request is still in progress", "bad_request")
    return answer_of(outcome)


async def cancel(request: Request, request_id: str) -> Response:
    """Ends a request that waits at once, and one that runs at its next step."""
    service, view = await _view(request, request_id)
    if not await service.board.cancel(view.row.id):
        return Json({"status": "ALREADY_COMPLETED"}, 400)
    service.runner.cancel(view.row.id)
    return Json({"status": "CANCELLATION_REQUESTED"}, 202)


async def _view(request: Request, request_id: str) -> tuple[Service, View]:
    service: Service = request.app.state.service
    key_id = await service.authenticate(request)  # before the look: a status of a random id tells whether a key is good
    if len(request_id) > 64 or not request_id.isascii() or not request_id.isprintable():
        raise not_found()
    return service, await service.board.view(request_id, key_id)


async def _status(service: Service, request: Request, view: View, logs_from: int | None) -> tuple[int, dict[str, Any]]:
    position = await service.board.queue_position(view.row.id) if view.row.state == "queued" else 0
    return status_of(view, urls(service.base_url(request), service.settings.endpoint, view.row.id), position, logs_from)


async def _states(service: Service, request: Request, view: View) -> AsyncIterator[bytes]:
    told, shown = 0, None
    last: dict[str, Any] = {}
    with_logs = _wants_logs(request)
    quiet = 0.0
    while True:
        changed = view.changed
        _, body = await _status(service, request, view, told if with_logs else None)
        told += len(body.get("logs") or ())  # before it is sent: lines that come meanwhile are the next event's
        state = {name: value for name, value in body.items() if name != "logs"}
        preview = preview_uri(view) if view.preview is not shown else None
        if preview is not None and view.row.state == "running":
            body["preview"] = preview
            shown = view.preview
        if state != last or body.get("logs") or "preview" in body:
            yield b"data: " + to_json(body) + b"\n\n"
            last, quiet = state, 0.0
        elif quiet >= PING_SECONDS:
            yield PING
            quiet = 0.0
        if view.row.state == "done":
            return
        if not changed.is_set():
            before = asyncio.get_running_loop().time()
            await service.board.change(view, 1.0)
            quiet += asyncio.get_running_loop().time() - before
        view = await service.board.view(view.row.id, view.row.key_id)


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs") in WANTS_LOGS
