"""Ctrl-C at a server in a terminal."""

import asyncio
import os
import pty
import signal
import sys

from sparsectrl_lcm.service.server import _stop_signal

from .server_process import FORKED
from .waiting import SECONDS


def test_the_first_ctrl_c_waits_and_the_second_does_not() -> None:
    terminal, end = pty.openpty()
    process = FORKED.Process(target=_drain, args=(os.ttyname(end),), daemon=True)
    process.start()
    assert process.pid is not None
    with os.fdopen(terminal) as lines:
        assert lines.readline() == "started\n"
        os.kill(process.pid, signal.SIGINT)
        told = "stopping: the running request is finished, at most 30 s; Ctrl-C again ends now\n"
        assert (lines.readline(), lines.readline()) == (told, "draining\n")
        os.kill(process.pid, signal.SIGINT)
        process.join(SECONDS)
    os.close(end)
    assert process.exitcode == -signal.SIGINT


def _drain(terminal: str) -> None:
    """Waits as a server does, first for the signal and then for a request, with stderr in a terminal."""
    os.dup2(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), 2)

    async def scenario() -> None:
        stop = _stop_signal(30.0)
        print("started", file=sys.stderr, flush=True)
        await stop.wait()
        print("draining", file=sys.stderr, flush=True)
        await asyncio.sleep(2 * SECONDS)

    asyncio.run(scenario())
