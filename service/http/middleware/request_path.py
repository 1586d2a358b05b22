"""Paths without the prefix of the queue, with a slash at the beginning and none at the end."""

from starlette.types import ASGIApp, Receive, Scope, Send

from ...protocol.urls import QUEUE_PREFIX


class RequestPath:
    """Normalises the path. `scope["has_queue_prefix"]` is whether it had the prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its normalised path."""
        await self._app(normalised(scope) if scope["type"] == "http" else scope, receive, send)


def normalised(scope: Scope) -> Scope:
    """Returns a scope whose path begins with a slash and has neither the prefix nor a slash at the end."""
    path: str = scope["path"]
    if not path.startswith("/"):  # "*", which means the server itself
        path = f"/{path}"
    inner = dict(scope)
    if path == QUEUE_PREFIX or path.startswith(QUEUE_PREFIX + "/"):
        path, inner["has_queue_prefix"] = path[len(QUEUE_PREFIX) :] or "/", True
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    inner["path"], inner["root_path"] = path, ""
    return inner
