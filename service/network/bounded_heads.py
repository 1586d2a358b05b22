"""Connections to other hosts that bound what arrives before a response: a host may send `100 Continue` without end."""

import ssl
from typing import Any

import httpcore

HEAD_BYTES = 64 * 1024
"""Most bytes before the end of a response's head."""
PIECE_BYTES = 2048
"""Read at once before that, so that the event loop is never busy for long."""


class BoundedHead(httpcore.AsyncNetworkStream):
    """A stream that counts what it reads after each request, until `head_read` is called."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._left: int | None = HEAD_BYTES

    def head_read(self) -> None:
        """Ends the bound: what follows is the body, which others limit."""
        self._left = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Reads; raises httpcore.RemoteProtocolError if the head does not end."""
        if self._left is None:
            return await self._stream.read(max_bytes, timeout)
        if self._left <= 0:
            raise httpcore.RemoteProtocolError(f"no response within {HEAD_BYTES} bytes")
        data = await self._stream.read(min(max_bytes, PIECE_BYTES), timeout)
        self._left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Writes a part of a request, whose response has a new bound."""
        self._left = HEAD_BYTES
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Continues in TLS, with the same bound."""
        return BoundedHead(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """Returns what the stream knows of its connection."""
        return self._stream.get_extra_info(info)
