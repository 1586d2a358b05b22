"""All components of a running service in one object, which routes and workers share."""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Depends
from starlette.requests import Request

from .auth.api_keys import Keyring
from .auth.webhook_signatures import Signer
from .metrics import Metrics
from .objects.object_stores import Files
from .protocol.urls import QUEUE_PREFIX
from .queue.request_states import Board
from .runner import Runner
from .settings import Settings
from .store import SqlStore

LARGE_BODIES = 4
"""How many large bodies may be in memory at once."""
_AUTHORITY = re.compile(r"[A-Za-z0-9._-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")


@dataclass(slots=True)
class Service:
    """A service. The application holds it as `app.state.service`.

    Attributes:
        settings: the settings.
        store: requests, logs, keys, file records and webhooks, in SQL.
        files: the bytes of uploads and clips.
        runner: makes the clips.
        board: the state of every request, for routes and dispatcher.
        keyring: checks API keys.
        signer: signs webhooks.
        metrics: counts and times for Prometheus.
        secret: 32 bytes that sign tokens, the same on every start.
        draining: true while the server shuts down. It then begins nothing more.
        large_bodies: a task holds it while it has a large body in memory.
    """

    settings: Settings
    store: SqlStore
    files: Files
    runner: Runner
    board: Board
    keyring: Keyring
    signer: Signer
    metrics: Metrics
    secret: bytes
    draining: bool = False
    large_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LARGE_BODIES))

    def base_url(self, request: Request) -> str:
        """Returns the root URL and the queue's prefix if the caller used it, without a slash at the end."""
        return self.root_url(request) + (QUEUE_PREFIX if request.scope.get("has_queue_prefix") else "")

    def root_url(self, request: Request) -> str:
        """Returns the public URL of the settings, or the scheme and authority that the caller used."""
        if self.settings.public_url:
            return self.settings.public_url.rstrip("/")
        host = request.headers.get("Host", "")
        if not _AUTHORITY.fullmatch(host):
            server = request.scope.get("server") or ("127.0.0.1", 80)
            host = f"{server[0]}:{server[1]}"
        return f"{request.scope['scheme']}://{host}"

    def role(self, request: Request) -> Literal["queue", "run"]:
        """Returns what a POST to the endpoint means. fal decides by host name; here port or prefix may decide too."""
        of_proxy: Literal["queue", "run"] | None = request.scope.get("proxy_role")
        if of_proxy is not None:
            return of_proxy
        server = request.scope.get("server")
        on_port = self.settings.queue_port is not None and server is not None and server[1] == self.settings.queue_port
        host = request.headers.get("Host", "").lower()
        in_queue = request.scope.get("has_queue_prefix") or on_port or host.startswith("queue.")
        return "queue" if in_queue else "run"


async def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(_service_of)]
"""A route's parameter: the service."""
