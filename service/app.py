"""The ASGI application: one front for every request, and behind it the routes."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Json, to_json
from .context import Service
from .errors import ServiceError
from .paths import PROXY, loggable, proxied, routed
from .routes import files, operations, page, queue, run, storage, tokens
from .status import WANTS_LOGS, status_of, urls

EXPOSED = "x-fal-request-id, x-fal-request-timeout-type, x-fal-error-type, x-fal-billable-units, etag"
METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

log = logging.getLogger("sparsectrl_lcm.service.http")


def create_app(service: Service, lifespan: Lifespan | None = None) -> ASGIApp:
    """The application of a service that is put together already."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    endpoint = service.settings.endpoint
    routers = (queue.make_router(endpoint), run.make_router(endpoint))
    for router in (*routers, operations.router, storage.router, tokens.router, files.router, page.router):
        app.include_router(router)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    return Front(app, service)


class Front:
    """What holds for every answer: request id, CORS, JSON for all errors; and the short way of status polls.

    Python's client asks for a state ten times a second, so those that memory can answer go past the routing.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        endpoint = re.escape(service.settings.endpoint)
        self._request = re.compile(rf"/{endpoint}/requests/([0-9A-Za-z-]{{1,64}})(/.*)?")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":  # lifespan: the listeners take no websockets
            await self._app(scope, receive, send)
            return
        scope, refused = routed(scope), None
        if scope["path"] == PROXY and scope["method"] != "OPTIONS":
            try:
                scope = proxied(scope)
            except ServiceError as error:
                refused = error
        about = self._request.fullmatch(scope["path"])
        request_id = about[1] if about is not None else str(uuid.uuid4())
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        headers = _headers(scope, request_id)
        if scope["method"] == "GET" and scope["path"].endswith("/status") and about is not None:
            answer = self._known_status(scope, request_id)
            if answer is not None:
                await _send(send, *answer, headers)
                return
        await self._answer(scope, receive, send, headers, refused)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        refused: ServiceError | None,
    ) -> None:
        start, status = time.monotonic(), 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message.get("headers", [])}
                message["headers"] = [*message.get("headers", []), *(h for h in headers if h[0] not in there)]
            await send(message)

        try:
            if scope["method"] == "OPTIONS":
                await Response(status_code=204)(scope, receive, told)
            elif refused is not None:
                await Json(refused.body, refused.status, refused.headers)(scope, receive, told)
            else:
                await self._app(scope, receive, told)
        except Exception:
            log.exception("%s %s failed", scope["method"], loggable(scope))
            if not status:
                body = {"detail": "Internal Server Error", "error_type": "internal_error"}
                await Json(body, 500)(scope, receive, told)
        finally:
            if log.isEnabledFor(logging.INFO):
                about = {"method": scope["method"], "path": loggable(scope), "status": status}
                about |= {"request_id": scope["state"]["request_id"], "seconds": round(time.monotonic() - start, 4)}
                log.info("answered", extra=about)

    def _known_status(self, scope: Scope, request_id: str) -> tuple[int, bytes] | None:
        service, request = self._service, Request(scope)
        key_id = service.remembered(request.headers.get("Authorization"))
        view = service.board.known(request_id)
        if key_id is None or view is None or view.row.key_id != key_id:
            return None
        position: int | None = 0
        if view.row.state == "queued":
            position = service.board.position(request_id)
        if position is None:
            return None
        logs_from = 0 if request.query_params.get("logs") in WANTS_LOGS else None
        links = urls(service.base_url(request), service.settings.endpoint, request_id)
        code, body = status_of(view, links, position, logs_from)
        return code, to_json(body)


def _headers(scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"x-fal-request-id", request_id.encode("latin-1", "replace")),
        (b"access-control-allow-origin", b"*"),
        (b"access-control-expose-headers", EXPOSED.encode()),
    ]
    if scope["method"] == "OPTIONS":
        asked = next((value for name, value in scope["headers"] if name == b"access-control-request-headers"), b"*")
        headers += [
            (b"access-control-allow-methods", METHODS.encode()),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", b"86400"),
        ]
    return headers


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    plain = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": body})


async def _service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return Json(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail: Any = error.detail
    if error.status_code == 404:
        detail = f"Path {request.url.path} not found"
    return Json({"detail": detail}, error.status_code, dict(error.headers or {}))
