"""fal's server-side proxy: all calls go to one URL and name their target in a header. The target is this server."""

from urllib.parse import unquote, urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from ...protocol.errors import ServiceError
from ...protocol.urls import PROXY_PATH
from .request_path import normalised

METHODS = ("GET", "POST", "PUT", "DELETE")
HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai")


class ProxyTarget:
    """Replaces the proxy's path with the target's. A call without an allowed target keeps the proxy's path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on to its target."""
        if scope["type"] == "http" and scope["path"] == PROXY_PATH and scope["method"] != "OPTIONS":
            try:
                scope = target_of(scope)
            except ServiceError as error:
                scope["proxy_error"] = error  # the route of the proxy's path raises it
        await self._app(scope, receive, send)


def target_of(scope: Scope) -> Scope:
    """Returns the scope of the target. Only the target's host decides between run and queue.

    Raises:
        ServiceError: 400 without a target or for one that is not ASCII, 405 for another method, 412 for a target that
            is not fal's or is the proxy.
    """
    if scope["method"] not in METHODS:
        raise ServiceError(405, f"{scope['method']} is not supported", headers={"Allow": ", ".join(METHODS)})
    target = next((value for name, value in scope["headers"] if name == b"x-fal-target-url"), b"").decode("latin-1")
    if not target:
        raise ServiceError(400, "the header x-fal-target-url is missing")
    if not target.isascii():
        raise ServiceError(400, "x-fal-target-url: not ASCII; percent-encode the other characters")
    try:
        parts = urlsplit(target)
        host = (parts.hostname or "").lower()
    except ValueError:
        host = ""
    if host not in HOSTS:
        raise ServiceError(412, f"x-fal-target-url: the host is none of {', '.join(HOSTS)}")
    path = parts.path or "/"
    inner: Scope = dict(scope) | {"path": unquote(path), "raw_path": path.encode()}
    inner["query_string"] = parts.query.encode()
    inner["has_queue_prefix"] = host.startswith("queue.")
    inner["proxy_role"] = "queue" if inner["has_queue_prefix"] else "run"
    inner = normalised(inner)
    if inner["path"] == PROXY_PATH:
        raise ServiceError(412, "x-fal-target-url: the target is the proxy itself")
    return inner
