"""The URL that a caller used: the base of URLs in the response, and whether a POST submits or runs."""

import re
from typing import Literal

from starlette.requests import Request

from ..protocol.urls import QUEUE_PREFIX
from ..settings import Settings

_AUTHORITY = re.compile(r"[A-Za-z0-9._-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")


def base_url(settings: Settings, request: Request) -> str:
    """Returns the root URL and the queue's prefix if the caller used it, without a slash at the end."""
    return root_url(settings, request) + (QUEUE_PREFIX if request.scope.get("has_queue_prefix") else "")


def root_url(settings: Settings, request: Request) -> str:
    """Returns the public URL of the settings, or the scheme and authority that the caller used."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = request.headers.get("Host", "")
    if not _AUTHORITY.fullmatch(host):
        server = request.scope.get("server") or ("127.0.0.1", 80)
        host = f"{server[0]}:{server[1]}"
    return f"{request.scope['scheme']}://{host}"


def role(settings: Settings, request: Request) -> Literal["queue", "run"]:
    """Returns what a POST to the endpoint means. fal decides by host name; here port or prefix may decide too."""
    of_proxy: Literal["queue", "run"] | None = request.scope.get("proxy_role")
    if of_proxy is not None:
        return of_proxy
    server = request.scope.get("server")
    on_port = settings.queue_port is not None and server is not None and server[1] == settings.queue_port
    host = request.headers.get("Host", "").lower()
    in_queue = request.scope.get("has_queue_prefix") or on_port or host.startswith("queue.")
    return "queue" if in_queue else "run"
