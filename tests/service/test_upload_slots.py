"""How many bodies arrive on disk at once is bounded, so that many senders take little memory."""

import asyncio
import contextlib
import selectors
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from sparsectrl_lcm.service.http.body_slots import BodySlots
from sparsectrl_lcm.service.protocol.errors import ServiceError

from .conftest import Server, started
from .test_attacks import MIB, resident
from .waiting import SECONDS, wait_until

CLIENTS = 300
SENT = 900_000
MEMORY = 120 * MIB
"""The loop reads up to 256 KiB of each connection at once, 75 MiB in all."""


def test_many_uploads_at_once_take_little_memory(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        server.wait()
        before = resident(server)
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(begun(server)) for _ in range(CLIENTS)]
            send(sockets, bytes(SENT))
            most = 0
            end = time.monotonic() + 2
            while time.monotonic() < end:
                most = max(most, resident(server))
                time.sleep(0.05)
        print(f"memory {before / MIB:.0f} MiB, with {CLIENTS} uploads {most / MIB:.0f} MiB")
        assert most - before < MEMORY
        with httpx.Client(headers=server.headers(), timeout=30) as client:
            end = time.monotonic() + SECONDS
            while (answer := client.post(f"{server.url}/files/upload", content=b"x")).status_code == 429:
                assert time.monotonic() < end, "the places of closed connections are free soon"
                time.sleep(0.05)
            assert answer.status_code == 200


def begun(server: Server) -> socket.socket:
    """A connection that has sent the head of an upload."""
    sock = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Key {server.key}\r\n"
    sock.sendall(f"{head}Content-Length: {2 * SENT}\r\n\r\n".encode())
    sock.setblocking(False)
    return sock


def send(sockets: list[socket.socket], body: bytes) -> None:
    """Sends a body on all connections, as far as the server takes it."""
    left = dict.fromkeys(sockets, len(body))
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            selector.register(sock, selectors.EVENT_WRITE)
        while ready := selector.select(0.5):
            for key, _ in ready:
                sock: socket.socket = key.fileobj  # type: ignore[assignment]
                left[sock] -= sock.send(body[: left[sock]])
                if not left[sock]:
                    selector.unregister(sock)
            if not any(left.values()):
                return


def test_uploads_that_wait_succeed_later(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load", uploads=2, key_uploads=1):

        def upload(number: int, url: str = f"{server.url}/files/upload", key: str = server.key) -> bytes:
            headers = {"Authorization": f"Key {key}"}
            sent = httpx.post(url, content=str(number).encode() * 100_000, headers=headers, timeout=30)
            return httpx.get(sent.raise_for_status().json()["url"]).content[:1]

        with ThreadPoolExecutor(5) as threads:
            assert list(threads.map(upload, range(10))) == [str(number).encode() for number in range(10)]


def test_slots_of_a_key_and_in_all() -> None:
    async def scenario() -> list[str]:
        slots = BodySlots(3, 2, 0.05)
        got = []
        async with contextlib.AsyncExitStack() as held:
            for key in "aaabc":
                try:
                    await held.enter_async_context(slots.hold(key))
                    got.append(key)
                except ServiceError as error:
                    assert (error.status, error.error_type) == (429, "too_many_uploads")
                    assert int(error.headers["Retry-After"]) > 0
                    got.append("")
        async with slots.hold("a"), slots.hold("a"), slots.hold("c"):  # those that gave up hold none
            return got

    assert asyncio.run(scenario()) == ["a", "a", "", "b", ""]


def test_a_waiting_upload_takes_the_slot_that_is_left() -> None:
    async def scenario() -> list[int]:
        slots, begun = BodySlots(2, 1, SECONDS), []

        async def body(number: int) -> None:
            async with slots.hold("a"):
                begun.append(number)
                if number == 1:
                    raise OSError

        await asyncio.gather(*map(body, range(4)), return_exceptions=True)
        return begun

    assert asyncio.run(scenario()) == [0, 1, 2, 3]


def test_only_a_few_wait() -> None:
    async def scenario() -> list[str]:
        slots, told = BodySlots(9, 1, SECONDS), []

        async def body() -> None:
            try:
                async with slots.hold("a"):
                    await asyncio.sleep(0.01)
                    told.append("held")
            except ServiceError as error:
                told.append(str(error.status))

        await asyncio.gather(*(body() for _ in range(7)))
        await body()
        return told

    assert asyncio.run(scenario()) == ["429"] * 2 + ["held"] * 6


def trickle(sock: socket.socket) -> None:
    """Sends a little every now and then, as a slow sender does."""
    with contextlib.suppress(OSError):
        for _ in range(1000):
            sock.send(b"x")
            time.sleep(0.1)


def test_the_answer_to_a_client_that_waited_in_vain(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load", key_uploads=1, body_seconds=5.0):
        with begun(server) as sock:
            threading.Thread(target=trickle, args=(sock,), daemon=True).start()
            wait_until(lambda folder=server.data / "tmp": any(folder.glob("*")))  # it has the slot
            answer = httpx.post(f"{server.url}/files/upload", content=b"x", headers=server.headers(), timeout=30)
        assert (answer.status_code, answer.json()["error_type"]) == (429, "too_many_uploads")
        assert int(answer.headers["retry-after"]) > 0
