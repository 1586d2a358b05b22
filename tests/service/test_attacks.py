"""Attacks without a key, and with one, in the sizes that once brought the service down: others are served meanwhile."""

import contextlib
import http.client
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from .conftest import APP, Server, started

MIB = 2**20
PIPELINE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
Attack = Callable[[Server, int], contextlib.AbstractContextManager[None]]
SECONDS = 6.0
P99, MEMORY = 0.1, 300 * MIB


@contextlib.contextmanager
def pipelines(server: Server, count: int) -> Iterator[None]:
    """Connections that each send 512 KB of requests and never read."""

    def send(sock: socket.socket) -> None:
        sock.settimeout(SECONDS)
        with contextlib.suppress(OSError):
            sock.sendall(PIPELINE * (512 * 1024 // len(PIPELINE)))

    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            threading.Thread(target=send, args=(sock,), daemon=True).start()
        yield


@contextlib.contextmanager
def idle_sockets(server: Server, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        yield


@contextlib.contextmanager
def senders(server: Server, count: int) -> Iterator[None]:
    """Clients that send prompts of 32 MB, one after the other."""
    body = b'{"prompt": "' + b"a" * (32 * MIB - 20) + b'"}'
    stop = threading.Event()

    def send() -> None:
        with httpx.Client(headers=server.headers(), timeout=60) as client, contextlib.suppress(httpx.HTTPError):
            while not stop.is_set():
                client.post(f"{server.url}/{APP}", content=body)

    threads = [threading.Thread(target=send, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


def run(attack: Attack, server: Server, count: int) -> None:
    with attack(server, count):
        time.sleep(3600)


@contextlib.contextmanager
def ending(process: multiprocessing.process.BaseProcess) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.join()


ATTACKS = {"pipelines": (pipelines, 40), "idle sockets": (idle_sockets, 2000), "large bodies": (senders, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_served(tmp_path: Path, name: str) -> None:
    attack, count = ATTACKS[name]
    for server in started(tmp_path, pipeline="stub_pipeline:load"):
        server.wait()
        seconds, memory = [], 0
        process = multiprocessing.get_context("fork").Process(target=run, args=(attack, server, count), daemon=True)
        process.start()
        with contextlib.closing(process), ending(process):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                start = time.perf_counter()
                ask(server)
                seconds.append(time.perf_counter() - start)
                memory = max(memory, resident(server))
                time.sleep(0.02)
        p50, p99 = np.percentile(seconds, (50, 99))
        print(f"{name} x {count}: {len(seconds)} asked, p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms,", end=" ")
        print(f"memory {memory / MIB:.0f} MiB")
        assert p99 < P99
        assert memory < MEMORY


def ask(server: Server) -> None:
    """Asks for /healthz on a new connection. What fails has waited for as long as it takes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.suppress(OSError), contextlib.closing(connection):
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200


def resident(server: Server) -> int:
    """The bytes of the server's process in memory."""
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024
