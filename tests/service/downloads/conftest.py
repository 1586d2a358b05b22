"""Servers that answer as a test says, and names that lead where it says."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpcore
import pytest
from sparsectrl_lcm.service.network.downloads import fetch

from ..waiting import SECONDS

LOOPBACK = ("127.0.0.0/8", "::1")
PUBLIC = "93.184.215.14"
NOT_REACHED = "cannot be reached, or is not public"
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Server:
    """Reads the head of a request on each connection, then answers with what `answer` writes."""

    def __init__(self, answer: bytes | Callable[[Writer], Awaitable[None]]) -> None:
        self.answer = answer
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.port = 0

    async def handle(self, reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            lengths = [int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length:")]
            self.bodies.append(await reader.readexactly(sum(lengths)))
            if isinstance(self.answer, bytes):
                writer.write(self.answer)
                await writer.drain()
            else:
                await self.answer(writer)
        writer.close()


@asynccontextmanager
async def serving(
    answer: bytes | Callable[[Writer], Awaitable[None]], host: str = "127.0.0.1", **options: Any
) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.handle, host, 0, **options)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(where: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


async def get(url: str, **changes: Any) -> bytes:
    options = {"limit_bytes": 1000, "seconds": SECONDS, "redirects": 3, "allow": LOOPBACK} | changes
    file = io.BytesIO()
    await fetch(url, file, **options)
    return file.getvalue()


def fetched(answer: Any, path: str = "/image.png", **changes: Any) -> tuple[bytes, Server]:
    async def run() -> tuple[bytes, Server]:
        async with serving(answer) as server:
            return await get(f"http://127.0.0.1:{server.port}{path}", **changes), server

    return asyncio.run(run())


class Names:
    """Name servers that return one list of addresses after the other."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses of all connections. They are redirected to loopback, so that public addresses have a server."""
    addresses: list[str] = []
    connect = httpcore.AnyIOBackend.connect_tcp

    async def redirected(self: Any, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        addresses.append(host)
        return await connect(self, "127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", redirected)
    yield addresses
