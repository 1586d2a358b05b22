"""Answers of hosts: whole, chunked, without end, compressed, slow, or no HTTP at all."""

import asyncio
import errno
import io
import ssl
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.network import downloads as fetching
from sparsectrl_lcm.service.network.downloads import FetchError, FetchTooLarge, fetch

from ..waiting import SECONDS
from .conftest import LOOPBACK, PUBLIC, Names, Writer, fetched, get, ok, serving


def test_download() -> None:
    body, server = fetched(ok(b"picture"), "/a%20b.png?x=1&y=%2F#fragment")
    assert body == b"picture"
    head = server.heads[0].split("\r\n")
    assert head[0] == "GET /a%20b.png?x=1&y=%2F HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in head
    assert [line for line in head if line.lower().startswith("accept-encoding")] == ["Accept-Encoding: identity"]


def test_chunked_and_unbounded_answers() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
    assert fetched(chunked)[0] == b"abcdefg"
    assert fetched(b"HTTP/1.0 200 OK\r\n\r\nto the end")[0] == b"to the end"
    assert fetched(ok(b"x" * 1000))[0] == b"x" * 1000


@pytest.mark.parametrize(
    "status", ["204 No Content", "206 Partial", "304 Same", "401 Who", "404 No", "500 Oh", "302 No"]
)
def test_only_200_is_a_file(status: str) -> None:
    with pytest.raises(FetchError, match="answers no file") as raised:
        fetched(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
    assert status[:3] not in str(raised.value)  # an allowed private host may be internal
    assert status[:3] in raised.value.reason


def test_the_status_of_a_public_host_is_told(connected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "is_public", lambda address: address == ip_address("127.0.0.1"))  # the peer here

    async def run() -> None:
        async with serving(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n") as server:
            await get(f"http://public.test:{server.port}/", allow=(), resolver=Names([PUBLIC]))

    with pytest.raises(FetchError, match="answers 404"):
        asyncio.run(run())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
def test_nothing_is_decompressed(encoding: str) -> None:
    with pytest.raises(FetchError, match="compresses"):
        fetched(ok(b"x", f"Content-Encoding: {encoding}"))


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 1001),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
    ],
)
def test_answers_that_are_too_large(answer: bytes) -> None:
    with pytest.raises(FetchTooLarge, match="more than 1000 bytes"):
        fetched(answer)


def test_an_answer_without_end() -> None:
    sent = 0

    async def endless(writer: Writer) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    with pytest.raises(FetchTooLarge):
        fetched(endless, limit_bytes=2**20)
    assert sent < 64 * 2**20  # the capacity of the system's buffers


def test_a_disk_that_is_full_is_not_the_hosts_fault() -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def run() -> None:
        async with serving(ok(b"picture")) as server:
            options = {"limit_bytes": 1000, "seconds": SECONDS, "redirects": 3, "allow": LOOPBACK}
            await fetch(f"http://127.0.0.1:{server.port}/", Full(), **options)

    with pytest.raises(OSError, match="No space"):
        asyncio.run(run())


def test_what_the_system_says_of_a_connection_is_an_error_of_httpx() -> None:
    with pytest.raises(httpx.NetworkError, match="bad record"), fetching._mapped_errors():
        raise ssl.SSLError("bad record")


async def silent(writer: Writer) -> None:
    await asyncio.sleep(60)


def dripping(begin: bytes, part: bytes) -> Callable[[Writer], Awaitable[None]]:
    """An answer that goes on with the same part, and never ends."""

    async def answer(writer: Writer) -> None:
        writer.write(begin)
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)

    return answer


async def stalled(writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    "answer",
    [
        silent,
        dripping(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        dripping(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        stalled,
    ],
    ids=["silent", "dripping body", "dripping head", "informing", "stalled"],
)
def test_time_is_bounded(answer: Any) -> None:
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"longer than 0\.3 seconds"):
        fetched(answer, seconds=0.3)
    assert time.monotonic() - start < SECONDS / 2


def test_the_time_of_a_name_server_counts() -> None:
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    with pytest.raises(FetchError, match=r"longer than 0\.2 seconds"):
        asyncio.run(get("http://slow.test/", seconds=0.2, resolver=slow))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\x01\x02",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http(answer: bytes) -> None:
    with pytest.raises(FetchError, match="does not speak HTTP"):
        fetched(answer)
