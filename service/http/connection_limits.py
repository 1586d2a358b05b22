"""uvicorn's HTTP protocol with limits on the time and bytes with which a client may keep a connection busy."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .connections import Connections
from .turns import Turns

HEAD_BYTES = 64 * 1024
"""Most bytes in a row outside a body: a head, the lines between chunks, trailers."""
WAITING_REQUESTS = 16
"""With so many requests waiting on a connection for an earlier one's answer, nothing more is read from it."""
SLICE_BYTES, BODY_SLICE_BYTES = 256, 4096
"""Bytes that the parser gets at once, outside and inside a body: a slice may hold a request per 18 bytes."""
LINGER_SECONDS = 3.0
"""After an early answer, the server drops what the client still sends for this long, so that it can read the answer."""


def _closing_if_early(cycle: RequestResponseCycle) -> Callable[[Any], Awaitable[None]]:
    """Returns the request's `send`, which adds `Connection: close` if the answer comes before the whole body."""
    send = cycle.send

    async def closing(message: Any) -> None:
        if message["type"] == "http.response.start" and cycle.more_body:
            cycle.keep_alive = False  # the rest of the body would be parsed as the next request
        await send(message)

    return closing


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections that keep the server waiting.

    uvicorn limits only the silence after an answer, and drops that limit at the next byte. Slow senders and slow
    readers could hold connections for ever. Here a timer runs whenever no request is being answered. During a
    request, the code that reads its body limits the wait.
    """

    header_seconds: ClassVar[float] = 20.0
    write_seconds: ClassVar[float] = 60.0
    open_connections: ClassVar[Connections] = Connections(2_000, 1_000)
    turns: ClassVar[Turns] = Turns()

    @classmethod
    def bounded(
        cls,
        header_seconds: float,
        write_seconds: float = 60.0,
        most_connections: int = 2_000,
        most_of_address: int = 1_000,
    ) -> type["BoundedProtocol"]:
        """Returns the protocol with its limits.

        Args:
            header_seconds: longest time for the head of a request to arrive.
            write_seconds: longest time for which a client may read nothing of an answer.
            most_connections: most connections of one listener at once. A further one ends the one that has been idle
                longest, and gets a 503 if none is idle.
            most_of_address: the same for the connections of one address.
        """
        bounds = {"header_seconds": header_seconds, "write_seconds": write_seconds}
        shared = {"open_connections": Connections(most_connections, most_of_address), "turns": Turns()}
        return type("Bounded", (cls,), bounds | shared)

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        self._head_bytes = 0
        self._in_head = True
        self._held = b""
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        super().connection_made(_LimitedTransport(transport, self))  # type: ignore[arg-type]
        if not self.open_connections.add(self, self.client[0] if self.client else None):
            self.transport.write(_BUSY)
            self.transport.close()
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._disarm()
        self.open_connections.remove(self)
        self.resume_writing()
        super().connection_lost(exc)
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._held += data
        self._parse_held()
        if self.transport.is_closing():
            return
        if self._waits and self.timeout_keep_alive_task is None and self._timer is None:
            self._arm()  # bytes that do not begin a request, such as empty lines

    def send_400_response(self, msg: str) -> None:
        """What arrived is no HTTP."""
        self.transport.write(_last_answer(HTTPStatus.BAD_REQUEST, msg, "bad_request"))
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._arm()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head; trailers are dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head of a request is complete."""
        self._in_head = False
        self._disarm()
        self.open_connections.touch(self)
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.send = _closing_if_early(self.cycle)  # type: ignore[assignment, method-assign]

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body of a request is complete."""
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is answered."""
        self.open_connections.touch(self)
        if self.pipeline:
            self.turns.add(self._begin_next)
        else:
            self._begin_next()

    def pause_writing(self) -> None:
        """The client reads the answer more slowly than it is written."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read most of what was written."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def unfinished(self) -> bool:
        """Whether a part of the last request is still missing."""
        return self.cycle is None or (not self.pipeline and self.cycle.more_body)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, or the client reads nothing of an answer."""
        return self._waits or self.flow.write_paused

    def give_way(self) -> None:
        """Ends the connection at once."""
        self.transport.abort()

    @property
    def holds(self) -> bool:
        """Whether bytes wait until earlier requests are answered. Nothing is read meanwhile."""
        return bool(self._held)

    def _begin_next(self) -> None:
        """Begins with the next request, if one waits, and parses what was held back behind it."""
        super().on_response_complete()
        self._parse_held()

    def _parse_held(self) -> None:
        """Parses what has arrived, until too many requests wait."""
        data, start = memoryview(self._held), 0
        while start < len(data) and len(self.pipeline) < WAITING_REQUESTS and not self.transport.is_closing():
            in_body = not self._in_head and self.cycle is not None and self.cycle.more_body
            part = data[start : start + (BODY_SLICE_BYTES if in_body else SLICE_BYTES)]
            start += len(part)
            self._head_bytes += len(part)
            super().data_received(part)  # type: ignore[arg-type]
            if self._head_bytes > HEAD_BYTES:
                self.transport.abort()
        self._held = bytes(data[start:])
        if self.transport.is_closing():
            self._held = b""
        if self._held:
            self.transport.pause_reading()
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    @property
    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _LimitedTransport:
    """A transport that closes within a limited time, whatever its client does.

    A plain close waits until the client has read the whole answer. If bytes still arrive, it also resets the
    connection, and the client may lose the answer.
    """

    def __init__(self, transport: asyncio.Transport, protocol: BoundedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def resume_reading(self) -> None:
        if not self._protocol.holds:
            self._transport.resume_reading()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._closing:
            self._transport.write(data)

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        seconds = self._protocol.write_seconds
        if not self._protocol.unfinished:
            self._transport.close()  # takes effect when the client has read everything
        else:
            self._protocol.flow.resume_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()
            if not self._transport.get_write_buffer_size():
                seconds = LINGER_SECONDS
        self._protocol.loop.call_later(seconds, self._transport.abort)


def _last_answer(status: HTTPStatus, detail: str, error_type: str) -> bytes:
    """Returns an answer after which the connection ends, as the application's errors look."""
    body = json.dumps({"detail": detail, "error_type": error_type}).encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


_BUSY = _last_answer(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections", "runner_scheduling_failure")
