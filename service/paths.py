"""What the path of a request means, and what of it may stand in a log."""

from urllib.parse import unquote, urlsplit

from starlette.types import Scope

from .context import QUEUE_PREFIX
from .errors import ServiceError

PROXY = "/api/fal/proxy"
PROXY_METHODS = ("GET", "POST", "PUT", "DELETE")
PROXY_HOSTS = ("fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai")


def routed(scope: Scope) -> Scope:
    """Without the prefix of the queue, and without a slash at the end."""
    path: str = scope["path"]
    inner = dict(scope)
    if path == QUEUE_PREFIX or path.startswith(QUEUE_PREFIX + "/"):
        path, inner["prefixed"] = path[len(QUEUE_PREFIX) :] or "/", True
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    inner["path"], inner["root_path"] = path, ""
    return inner


def proxied(scope: Scope) -> Scope:
    """What fal's server-side proxy is asked for: one URL, the target in a header; here the target is this server.

    The target's host tells a run from a submission, whichever way the proxy was reached.

    Raises:
        ServiceError: 400 without a target, 405 for another method, 412 for a target that is not fal's, or is the proxy.
    """
    if scope["method"] not in PROXY_METHODS:
        raise ServiceError(405, f"{scope['method']} is not supported", headers={"Allow": ", ".join(PROXY_METHODS)})
    target = next((value for name, value in scope["headers"] if name == b"x-fal-target-url"), b"").decode("latin-1")
    if not target:
        raise ServiceError(400, "the header x-fal-target-url is missing")
    try:
        parts = urlsplit(target)
        host = (parts.hostname or "").lower()
    except ValueError:
        host = ""
    if host not in PROXY_HOSTS:
        raise ServiceError(412, f"x-fal-target-url: the host is none of {', '.join(PROXY_HOSTS)}")
    path = parts.path or "/"
    inner: Scope = dict(scope) | {"path": unquote(path), "raw_path": path.encode("latin-1")}
    inner["query_string"] = parts.query.encode("latin-1")
    inner["prefixed"] = host.startswith("queue.")
    inner["role"] = "queue" if inner["prefixed"] else "run"
    inner = routed(inner)
    if inner["path"] == PROXY:
        raise ServiceError(412, "x-fal-target-url: the target is the proxy itself")
    return inner


def loggable(scope: Scope) -> str:
    """The path of the route: real paths hold the ids of files and uploads, which are all that guards them."""
    route = scope.get("route")
    if route is not None:
        return str(getattr(route, "path", "/"))
    first = scope["path"].split("/")[1]
    return f"/{first[:40]}" + ("/..." if scope["path"].count("/") > 1 else "")
