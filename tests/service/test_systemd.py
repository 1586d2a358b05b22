"""What systemd hears of a server that it started, over the socket that it would listen on."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.settings import Settings

from .conftest import ports
from .serving_here import serving_here
from .waiting import SECONDS


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_alive_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@{tmp_path.name}-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")

        async def heard(wanted: str) -> None:
            while wanted not in (await asyncio.to_thread(systemd.recv, 4096)).decode().split("\n"):
                pass

        async def scenario() -> None:
            port = ports()[0]
            async with serving_here(Settings(tmp_path / "data"), Listener("127.0.0.1", port)):
                assert "NOTIFY_SOCKET" not in os.environ
                await heard("READY=1")
                socket.create_connection(("127.0.0.1", port), timeout=SECONDS).close()
                await heard("STATUS=takes requests")
                await heard("WATCHDOG=1")
                await heard("WATCHDOG=1")
                time.sleep(0.5)  # the event loop hangs for longer than the period
                systemd.setblocking(False)
                while True:
                    try:
                        systemd.recv(4096)
                    except BlockingIOError:
                        break
                time.sleep(0.5)
                with pytest.raises(BlockingIOError):
                    systemd.recv(4096)
                systemd.settimeout(SECONDS)
                os.kill(os.getpid(), signal.SIGTERM)
                await heard("STOPPING=1")

        asyncio.run(scenario())


def test_without_systemd_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))  # a socket that is gone hinders nothing
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        monkeypatch.setenv("WATCHDOG_PID", "1")  # the variable was meant for another process

        async def scenario() -> None:
            async with serving_here(Settings(tmp_path / "data"), Listener("127.0.0.1", ports()[0])):
                await asyncio.sleep(0.1)

        asyncio.run(scenario())
        with pytest.raises(BlockingIOError):
            systemd.recv(4096)
