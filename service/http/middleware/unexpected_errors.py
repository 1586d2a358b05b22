"""Errors that no route expects."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...protocol.responses import Json
from .access_log import loggable_path

log = logging.getLogger("sparsectrl_lcm.service.http")


class UnexpectedErrors:
    """Logs an error and answers 500 in JSON, unless the response has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and handles its errors."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            log.exception("%s %s failed", scope["method"], loggable_path(scope))
            if not has_begun:
                body = {"detail": "Internal Server Error", "error_type": "internal_error"}
                await Json(body, 500)(scope, receive, send)
