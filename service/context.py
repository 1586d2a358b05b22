"""What every route needs: settings, the seams, and who is calling."""

import asyncio
import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request

from .board import Board
from .errors import ServiceError
from .files import Files
from .keys import ANONYMOUS, Keyring
from .metrics import Metrics
from .runner import Runner
from .settings import Settings
from .signing import Signer
from .store import SqlStore

QUEUE_PREFIX = "/queue"
LARGE_BODIES = 4
_AUTHORITY = re.compile(r"[A-Za-z0-9._-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")


@dataclass(slots=True)
class Service:
    """The service behind the routes, as `request.app.state.service`.

    Attributes:
        secret: 32 bytes, the same on every start, for tokens.
        draining: nothing more is begun, as the server is about to end.
        large_bodies: to be held while one is in memory.
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

    async def authenticate(self, request: Request) -> str:
        """The id of the caller's key.

        Raises:
            ServiceError: 401.
        """
        key_id = self.remembered(request.headers.get("Authorization"))
        if key_id is None:
            credentials = credentials_of(request.headers.get("Authorization"))
            key_id = None if credentials is None else await self.board.call(self.keyring.check, credentials)
        if key_id is None:
            detail = "invalid key credentials" if request.headers.get("Authorization") else "no key was given"
            raise ServiceError(401, detail, headers={"WWW-Authenticate": "Key"})
        return key_id

    def remembered(self, authorization: str | None) -> str | None:
        """The id of a key that needs no look into the store."""
        credentials = credentials_of(authorization)
        if credentials is None:
            return ANONYMOUS if self.settings.anonymous and not authorization else None
        return self.keyring.remembered(credentials)

    def base_url(self, request: Request) -> str:
        """Scheme, authority and prefix that the caller used, without a slash at the end."""
        return self.root_url(request) + (QUEUE_PREFIX if request.scope.get("prefixed") else "")

    def root_url(self, request: Request) -> str:
        """Scheme and authority that the caller used, or those of the settings."""
        if self.settings.public_url:
            return self.settings.public_url.rstrip("/")
        host = request.headers.get("Host", "")
        if not _AUTHORITY.fullmatch(host):
            server = request.scope.get("server") or ("127.0.0.1", 80)
            host = f"{server[0]}:{server[1]}"
        return f"{request.scope['scheme']}://{host}"

    def role(self, request: Request) -> Literal["queue", "run"]:
        """What a POST to the endpoint means: fal tells it by host, and here port or prefix may tell it too."""
        told: Literal["queue", "run"] | None = request.scope.get("role")
        if told is not None:
            return told
        server = request.scope.get("server")
        on_port = self.settings.queue_port is not None and server is not None and server[1] == self.settings.queue_port
        host = request.headers.get("Host", "").lower()
        return "queue" if request.scope.get("prefixed") or on_port or host.startswith("queue.") else "run"


def credentials_of(authorization: str | None) -> str | None:
    """What follows the scheme of an Authorization header; curl and others write Bearer for it."""
    scheme, _, credentials = (authorization or "").partition(" ")
    return credentials.strip() or None if scheme.lower() in ("key", "bearer") else None


def user_id(key_id: str) -> str:
    """The name under which webhooks tell whose request it was; says nothing of the key."""
    return hashlib.sha256(f"user {key_id}".encode()).hexdigest()[:24]
