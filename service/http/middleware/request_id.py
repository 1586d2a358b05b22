"""The id of a request, which every response carries: the one in its path, or a new one."""

import uuid
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...protocol.urls import request_path

HEADER = "x-fal-request-id"


class RequestId:
    """Puts the id into `request.state.request_id` and into the response's header."""

    def __init__(self, app: ASGIApp, endpoints: Iterable[str]) -> None:
        self._app = app
        self._path = request_path(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        found = self._path.fullmatch(scope["path"])
        request_id = str(uuid.uuid4()) if found is None else found[2]
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(HEADER, request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)
