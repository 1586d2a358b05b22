"""Addresses that the service listens on, and uvicorn as it serves there."""

import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn

from .http import BoundedProtocol
from .settings import Settings

BACKLOG = 2048


def url_host(host: str) -> str:
    """A host as it stands before a port: addresses of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class Listener:
    """An address; for https with what makes the context, which is called when the data folder is this server's."""

    host: str
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None

    def bind(self) -> socket.socket:
        """A socket that listens there; who connects waits until the server takes it.

        Raises:
            OSError: names the address and why it cannot be had.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
            bound.listen(BACKLOG)  # two sockets may be bound to one address; only one may listen
        except OSError as error:
            bound.close()
            raise OSError(f"{url_host(self.host)}:{self.port}: {error.strerror}; give another host or port") from None
        return bound


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def make_server(app: Any, settings: Settings, listener: Listener) -> uvicorn.Server:
    """What serves an application at one address."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol.bounded(settings.header_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        backlog=BACKLOG,
    )
    if listener.tls is not None:
        config.load()
        config.ssl = listener.tls()
    return _Server(config)
