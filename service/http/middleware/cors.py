"""CORS: pages of every origin may call, since keys identify callers, not cookies."""

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPOSED = "x-fal-request-id, x-fal-request-timeout-type, x-fal-error-type, x-fal-billable-units, etag"
METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"


class CorsHeaders:
    """Adds the headers that let a page read a response, even without an Origin header, unlike Starlette's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and adds the headers to its response."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("access-control-allow-origin", "*")
                headers.setdefault("access-control-expose-headers", EXPOSED)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Preflight:
    """Answers OPTIONS: allows every method, and the headers that the browser asks for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers OPTIONS and passes everything else on."""
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return await self._app(scope, receive, send)
        asked = next((value for name, value in scope["headers"] if name == b"access-control-request-headers"), b"*")
        headers = {
            "access-control-allow-methods": METHODS,
            "access-control-allow-headers": asked.decode("latin-1"),
            "access-control-max-age": "86400",
        }
        await Response(status_code=204, headers=headers)(scope, receive, send)
