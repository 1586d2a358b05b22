"""Answers status polls from memory, without routing or the store.

fal's Python client asks for the state of a request ten times a second.
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...auth.callers import remembered_key_id
from ...components import Endpoint, Service
from ...protocol.request_status import WANTS_LOGS, status_of
from ...protocol.responses import Json
from ...protocol.urls import request_path, request_urls
from ..called_url import base_url


class StatusPolls:
    """Answers a status poll if key, state and queue position are in memory. Passes everything else on."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._path = request_path(service.endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or passes the request on."""
        app = self._app
        if scope["type"] == "http" and scope["method"] == "GET":
            found = self._path.fullmatch(scope["path"])
            if found is not None and found[3] == "/status":
                app = self._known(Request(scope), self._service.endpoints[found[1]], found[2]) or app
        await app(scope, receive, send)

    def _known(self, request: Request, endpoint: Endpoint, request_id: str) -> Response | None:
        service = self._service
        key_id = remembered_key_id(service, request.headers.get("Authorization"))
        view = service.board.known(request_id)
        if key_id is None or view is None or (view.row.key_id, view.row.endpoint) != (key_id, endpoint.name):
            return None
        position = endpoint.queue.positions.known(request_id) if view.row.state == "queued" else 0
        if position is None:
            return None
        logs_from = 0 if request.query_params.get("logs") in WANTS_LOGS else None
        links = request_urls(base_url(service.settings, request), endpoint.name, request_id)
        status, body = status_of(view.row, view.logs, links, position, logs_from)
        return Json(body, status)
