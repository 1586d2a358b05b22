"""One line in the log for each response."""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBES = {"/healthz", "/readyz", "/metrics", "/page/about.json"}
"""Routes that monitors and open pages ask for every few seconds: lines of their successes are for debugging."""

log = logging.getLogger("sparsectrl_lcm.service.http")


class AccessLog:
    """Logs method, path, status, request id and seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and logs its response."""
        if scope["type"] != "http" or not log.isEnabledFor(logging.INFO):
            return await self._app(scope, receive, send)
        start, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            status = status or 500
            raise
        finally:
            line = {"method": scope["method"], "path": loggable_path(scope), "status": status}
            line |= {"request_id": scope["state"]["request_id"], "seconds": round(time.monotonic() - start, 4)}
            expected = line["path"] in PROBES and status < 400
            log.log(logging.DEBUG if expected else logging.INFO, "answered", extra=line)


def loggable_path(scope: Scope) -> str:
    """Returns the path of the route. The real path may hold the id of a file or upload, which must stay secret."""
    route = scope.get("route")
    if route is not None:
        return str(getattr(route, "path", "/"))
    first = scope["path"].split("/")[1]
    return f"/{first[:40]}" + ("/..." if scope["path"].count("/") > 1 else "")
