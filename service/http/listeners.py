"""The addresses that the service listens on, and the uvicorn server at each."""

import contextlib
import socket
from dataclasses import dataclass
from typing import Any

import uvicorn

from ..settings import Settings
from .connection_limits import BoundedProtocol
from .tls_certificates import Certificate

BACKLOG = 2048


def url_host(host: str) -> str:
    """Returns a host as a URL writes it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class Listener:
    """An address to listen on.

    Attributes:
        host: name or address.
        port: of TCP.
        tls: the certificate for https. It is loaded when the data folder is locked, since it may be written there.
    """

    host: str
    port: int
    tls: Certificate | None = None

    def bind(self) -> socket.socket:
        """Opens the socket. Clients may connect from now on, and wait until the server accepts them.

        Raises:
            OSError: the address cannot be used; the message names it and the reason.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # with the protocol named, asyncio sets TCP_NODELAY; without, an answer's second packet waits 40 ms
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
            bound.listen(BACKLOG)  # two sockets may be bound to one address; only one may listen
        except OSError as error:
            bound.close()
            raise OSError(f"{url_host(self.host)}:{self.port}: {error.strerror}; give another host or port") from None
        return bound


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def make_server(app: Any, settings: Settings, listener: Listener) -> uvicorn.Server:
    """Creates the server of an application at one address."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol.bounded(
            settings.header_seconds,
            most_connections=settings.connections,
            most_of_address=settings.address_connections,
        ),
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
        config.ssl = listener.tls.context()
    return _Server(config)
