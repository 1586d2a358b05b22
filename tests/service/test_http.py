"""Connections of clients that misbehave: closed in time, and bounded in memory."""

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import uvicorn
from sparsectrl_lcm.service.http.connection_limits import HEAD_BYTES, LINGER_SECONDS, BoundedProtocol
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.http.local_authority import local_certificate

from .loop_time import StillTime
from .waiting import SECONDS, wait_until

LIMIT = 20.0
"""Seconds that a client may take for a head, or read nothing. Time passes for a server only if a test lets it."""
LARGE, MIDDLE = 64 * 2**20, 60_000


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/early answers before the body is read, /large and /middle send long answers, /echo waits for the whole body."""
    size = 0
    more = scope["path"] == "/echo"
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"x" * {"/large": LARGE, "/middle": MIDDLE}.get(scope["path"], 0) or str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(body), 2**18):
        await send({"type": "http.response.body", "body": body[start : start + 2**18], "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@dataclass
class Served:
    port: int
    time: StillTime

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def until_closed(self, sock: socket.socket, drip: bytes = b"") -> tuple[float, bytes]:
        """Lets time pass until a connection ends, with a `drip` now and then; returns how much, and what was read."""
        seconds, got = 0.0, bytearray()
        sock.settimeout(0.05)
        while seconds < 10 * LIMIT:
            try:
                if drip:
                    sock.sendall(drip)
                part = sock.recv(2**16)
            except TimeoutError:
                self.time.pass_on(LIMIT / 5)
                seconds += LIMIT / 5
                continue
            except OSError:
                break
            if not part:
                break
            got += part
        return seconds, bytes(got)


@contextmanager
def served(
    tls: tuple[Path, Path] | None = None, send_buffer: int = 0, listener: Listener | None = None, **bounds: Any
) -> Iterator[Served]:
    protocol = BoundedProtocol.bounded(**{"header_seconds": LIMIT, "write_seconds": LIMIT, **bounds})
    files = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1, **files
    )
    server, times = uvicorn.Server(config), SimpleQueue[StillTime]()

    async def serve() -> None:
        times.put(StillTime())
        await server.serve([bound])

    with socket.create_server(("127.0.0.1", 0)) if listener is None else listener.bind() as bound:
        if send_buffer:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        still = times.get()
        wait_until(lambda: server.started)
        try:
            yield Served(bound.getsockname()[1], still)
        finally:
            server.should_exit = True
            still.go_on()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as made:
        yield made


def being_answered(server: Served, length: int) -> socket.socket:
    """A connection whose request is being answered: the application waits for a body of this length."""
    sock = server.connect()
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    sock.sendall(head % length)
    assert sock.recv(1000).startswith(b"HTTP/1.1 100 ")
    return sock


UNFINISHED = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
FINISHED = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab"
CHUNKED = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
        (UNFINISHED, b""),
        (UNFINISHED, b"x"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"x"),
        (b"nonsense\r\n\r\n", b"x"),
    ],
    ids=["silent", "empty lines", "endless head", "idle", "idle lines", "early", "early drip", "upgrade", "nonsense"],
)
def test_nobody_holds_a_connection(server: Served, first: bytes, drip: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(first)
        seconds, got = server.until_closed(sock, drip)
    assert seconds < 2 * LIMIT
    assert bool(got) == (first.endswith(b"\r\n\r\n"))


def test_nonsense_gets_an_answer_like_those_of_the_application(server: Served) -> None:
    with server.connect() as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        response = HTTPResponse(sock)
        response.begin()
        told = response.status, response.headers["content-type"], json.load(response)
    error = {"detail": "Invalid HTTP request received.", "error_type": "bad_request"}
    assert told == (400, "application/json", error)


def test_an_early_answer_is_read_although_the_body_goes_on(server: Served) -> None:
    with server.connect() as sock:
        sock.sendall(UNFINISHED.replace(b"1000000", b"100000000"))
        for _ in range(24):  # much more than a socket's buffers hold
            sock.sendall(b"x" * 2**20)
        assert server.until_closed(sock)[1].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("sent", "closes"), [(UNFINISHED, True), (FINISHED, False)], ids=["early", "in time"])
def test_an_answer_that_ends_the_connection_says_so(server: Served, sent: bytes, closes: bool) -> None:
    """Otherwise a client would send its next request on it."""
    with server.connect() as sock:
        sock.sendall(sent)
        head = server.until_closed(sock)[1].partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 200")
    assert (b"connection: close" in head) is closes


@pytest.mark.parametrize(
    ("first", "endless"),
    [(b"0\r\n", b"abc: def\r\n" * 100), (b"0\r\nabc: ", b"d" * 1000), (b"1\r\nx\r\n5;", b"d" * 1000)],
    ids=["trailers", "one trailer", "chunk extension"],
)
def test_what_is_no_body_is_bounded_within_one(server: Served, first: bytes, endless: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(CHUNKED + first)
        sent = 0
        with pytest.raises(OSError):
            while sent < 2**28:
                sent += sock.send(endless)
        assert sent < 2**24


def test_small_chunks_and_trailers_are_no_offence(server: Served) -> None:
    with server.connect() as sock:
        sock.sendall(CHUNKED + b"1\r\nx\r\n" * (2 * HEAD_BYTES) + b"0\r\nSome: trailer\r\n\r\n")
        assert server.until_closed(sock)[1].endswith(str(2 * HEAD_BYTES).encode())


def test_requests_may_follow_each_other(server: Served) -> None:
    with server.connect() as sock:
        sock.sendall((b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab" * 100) + CHUNKED + b"0\r\n\r\n")
        assert server.until_closed(sock)[1].count(b"HTTP/1.1 200") == 101


def test_a_reader_that_takes_nothing_is_cut_off(server: Served, tmp_path: Path) -> None:
    for ending in (b"", b"Connection: close\r\n"):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n" + ending + b"\r\n")
            assert sock.recv(1, socket.MSG_PEEK)  # the answer has begun
            server.time.pass_on(2 * LIMIT)
            assert len(server.until_closed(sock)[1]) < LARGE


def test_a_reader_that_is_slow_gets_all(server: Served) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        size = 0
        while part := sock.recv(2**20):
            size += len(part)
            server.time.pass_on(3 * LIMIT * len(part) / LARGE)
    assert size > LARGE


def test_tls_ends_in_time_too(tmp_path: Path) -> None:
    authority, *files = local_certificate(tmp_path)
    context = ssl.create_default_context(cafile=authority)
    with served((files[0], files[1])) as server:
        for first, drip in ((b"", b""), (UNFINISHED, b"x")):
            with context.wrap_socket(server.connect(), server_hostname="127.0.0.1") as sock:
                sock.sendall(first)
                seconds, got = server.until_closed(sock, drip)
            assert seconds < 2 * LIMIT and bool(got) == bool(first)


def test_the_end_of_an_answer_may_take_its_time(tmp_path: Path) -> None:
    authority, *files = local_certificate(tmp_path)
    context = ssl.create_default_context(cafile=authority)
    with served((files[0], files[1]), send_buffer=8192) as server:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(("127.0.0.1", server.port))
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            sock.sendall(b"GET /middle HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            size = len(sock.recv(1))
            server.time.pass_on(LINGER_SECONDS + 1)
            while part := sock.recv(2**16):
                size += len(part)
    assert size > MIDDLE


def test_connections_are_counted() -> None:
    with served(most_connections=3) as server, ExitStack() as opened:

        def answer() -> bytes:
            with server.connect() as sock:
                with suppress(ConnectionError):  # of a connection that was refused
                    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return server.until_closed(sock)[1]

        held = [opened.enter_context(being_answered(server, 9)) for _ in range(3)]  # so that none gives way
        with server.connect() as sock:
            refused = server.until_closed(sock)[1]
        for sock in held:
            sock.close()
        wait_until(lambda: b" 200 " in answer())  # the places are free
    assert b" 503 " in refused
    assert json.loads(refused.rpartition(b"\r\n")[2])["error_type"] == "runner_scheduling_failure"
