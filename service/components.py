"""All components of a running service, which routes and workers share, and what each endpoint has of its own."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.exceptions import HTTPException
from starlette.requests import Request

if TYPE_CHECKING:  # the folders that hold the parts import this file
    from ..runtime.format.manifest import Manifest
    from .auth.api_keys import Keyring
    from .auth.webhook_signatures import Signer
    from .http.body_slots import BodySlots
    from .metrics import Metrics
    from .objects.object_stores import Files
    from .queue.endpoint_queue import EndpointQueue
    from .queue.request_states import Board
    from .runner import Runner
    from .settings import Settings
    from .store import OwnerLock, SqlStore

LARGE_BODIES = 2
"""How many large bodies may be in memory at once."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A bundle that is served under a name.

    Attributes:
        name: the name that clients call, OWNER/NAME.
        runner: makes the clips.
        queue: its waiting requests.
        manifest: of its bundle, as it was when the server started.
    """

    name: str
    runner: "Runner"
    queue: "EndpointQueue"
    manifest: "Manifest"

    @property
    def frames(self) -> int:
        """Frames of its clips unless an input asks for another number. A later model may have others."""
        return int(self.runner.about.get("frames", self.manifest.sizes.frames))

    @property
    def needed_keyframes(self) -> str | None:
        """With how many keyframes its model was trained, in words; None if it makes clips without any, too."""
        record = self.manifest.trained_for
        return record.keyframes if record is not None and record.min_keyframes else None


@dataclass(slots=True)
class Service:
    """A service. The application holds it as `app.state.service`.

    Attributes:
        settings: the settings.
        store: requests, logs, keys, file records and webhooks, in SQL.
        owner_lock: keeps servers with a copy of the data folder from claiming the same requests.
        files: the bytes of uploads and clips.
        endpoints: by name.
        board: the state of every request, for routes and dispatchers.
        keyring: checks API keys.
        signer: signs webhooks.
        metrics: counts and times for Prometheus.
        secret: 32 bytes that sign tokens, the same on every start.
        answered_at: when the store last did the periodic work, as `time.monotonic`.
        draining: true while the server shuts down. It then begins nothing more.
        bodies: a task holds one of its slots while it receives a body to disk.
        large_bodies: a task holds it while it has a large body in memory.
    """

    settings: "Settings"
    store: "SqlStore"
    owner_lock: "OwnerLock"
    files: "Files"
    endpoints: Mapping[str, Endpoint]
    board: "Board"
    keyring: "Keyring"
    signer: "Signer"
    metrics: "Metrics"
    secret: bytes
    bodies: "BodySlots"
    answered_at: float = field(default_factory=time.monotonic)
    draining: bool = False
    large_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LARGE_BODIES))

    @property
    def database_problem(self) -> str | None:
        """What does not work of the database; None if it works."""
        return self.store.outage.problem


async def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _endpoint_of(request: Request) -> Endpoint:
    service: Service = request.app.state.service
    _, owner, alias, *_ = request.scope["path"].split("/")
    if (endpoint := service.endpoints.get(f"{owner}/{alias}")) is None:
        raise HTTPException(404)  # Starlette's routes take a path with a line feed at its end, too
    return endpoint


CurrentService = Annotated[Service, Depends(_service_of)]
"""A route's parameter: the service."""
CurrentEndpoint = Annotated[Endpoint, Depends(_endpoint_of)]
"""A route's parameter, below the path of an endpoint: this endpoint."""
