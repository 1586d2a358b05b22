"""Clients that send too much at once, or are too many: the others are still answered."""

import asyncio
import re
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from sparsectrl_lcm.service.http.connection_limits import BODY_SLICE_BYTES, WAITING_REQUESTS
from sparsectrl_lcm.service.http.connections import Connections
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.http.turns import Turns
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .test_http import LIMIT, being_answered, served
from .waiting import SECONDS

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_pipeline_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests behind the first ones are read only when those are answered, and all are answered in the end."""
    most, read = 0, HttpToolsProtocol.on_headers_complete

    def note(protocol: HttpToolsProtocol) -> None:
        nonlocal most
        read(protocol)
        most = max(most, len(protocol.pipeline))

    monkeypatch.setattr(HttpToolsProtocol, "on_headers_complete", note)
    with served() as server, server.connect() as sock:
        body = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)
        sending = threading.Thread(target=sock.sendall, args=((REQUEST * 300 + body) * 2,))
        sending.start()
        got, end = b"", time.monotonic() + SECONDS
        while got.count(b"\r\n\r\n100000") < 2 and time.monotonic() < end:
            got += sock.recv(2**16)
        sending.join()
    assert got.count(b"HTTP/1.1 200") == 602
    assert got.count(b"\r\n\r\n100000") == 2
    assert 1 < most < WAITING_REQUESTS + BODY_SLICE_BYTES / len(REQUEST)


def test_the_connection_that_is_idle_longest_gives_way() -> None:
    with served(most_connections=3, most_of_address=3) as server, ExitStack() as opened:
        busy = opened.enter_context(being_answered(server, 1))
        oldest, newer = (opened.enter_context(server.connect()) for _ in range(2))
        with server.connect() as sock:
            sock.sendall(REQUEST)
            assert b" 200 " in sock.recv(1000)
        assert server.until_closed(oldest)[0] < LIMIT, "earlier than by its own limit"
        for held, sent in ((newer, REQUEST), (busy, b"x")):
            held.sendall(sent)
            assert b" 200 " in held.recv(1000)


class Idle:
    """A connection that is always idle."""

    def __init__(self) -> None:
        self.idle, self.ended = True, False

    def give_way(self) -> None:
        self.ended = True


@pytest.mark.parametrize("host", ["10.0.0.{}", "2001:db8:0:{}::1"])
def test_one_address_cannot_take_the_place_of_others(host: str) -> None:
    connections = Connections(4, 2)
    others = [Idle(), Idle()]
    assert all(connections.add(other, host.format(number)) for number, other in enumerate(others))
    greedy = [Idle() for _ in range(10)]
    for number, one in enumerate(greedy):
        same = host.format(9)
        assert connections.add(one, same.replace("::1", f"::{number + 1}"))
    assert not any(other.ended for other in others)
    assert [one.ended for one in greedy] == [True] * 8 + [False] * 2
    greedy[-1].idle = greedy[-2].idle = False
    assert not connections.add(Idle(), host.format(9))
    for one in (*others, *greedy):
        connections.remove(one)
    assert not connections._count, "an attacker has many addresses"


def test_answers_are_sent_at_once() -> None:
    """Without TCP_NODELAY, the second packet of each answer on a kept connection waits for 40 ms."""
    with Listener("127.0.0.1", 0).bind() as bound:
        assert bound.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY if the protocol is named
    with (
        served(listener=Listener("127.0.0.1", 0)) as server,
        server.connect() as sock,
    ):
        seconds = []
        for _ in range(50):
            start = time.perf_counter()
            sock.sendall(REQUEST)
            got = b""
            while not re.search(rb"\r\n\r\n.", got):
                got += sock.recv(1000)
            seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) < 0.02


def test_waiting_requests_begin_one_per_turn_of_the_loop() -> None:
    """What was added first begins first, also after one that fails."""

    async def begun() -> list[str]:
        turns, told = Turns(), []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, about: told.append(str(about["exception"])))

        def fail() -> None:
            raise ValueError("failed")

        turns.add(lambda: told.append("first"))
        turns.add(fail)
        turns.add(lambda: told.append("second"))
        for _ in range(4):
            await asyncio.sleep(0)
            told.append("turn")
        turns.add(lambda: told.append("later"))
        await asyncio.sleep(0)
        return told

    assert asyncio.run(begun()) == ["first", "turn", "failed", "turn", "second", "turn", "turn", "later"]
