"""The server's handle of the runner's process: messages, output, and how the process ended."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from .interface import REFUSALS, RunnerLost

log = logging.getLogger(__package__)

END_SECONDS = 2.0
"""Longest time for a process and its output to end after its last message."""
MESSAGE_BYTES = 2**20
LINE_BYTES = 2000
LINES_KEPT = 20
LINES_LOGGED = 500
"""Most lines of output that are logged between two messages to the process: of the start, of a job."""


class RunnerProcess:
    """A process that runs `process_main.py`. `started` creates one.

    Attributes:
        ended: whether it has said its last message.
    """

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, output: "_Output"
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._output = output
        self.ended = False

    @classmethod
    @asynccontextmanager
    async def started(cls, work: Path | None) -> AsyncIterator["RunnerProcess"]:
        """Starts a process. Kills it and removes its files at the end of the block.

        Args:
            work: parent of its folder for temporary files; None means the system's.

        Raises:
            OSError: the system has no process, file descriptor or folder left.
        """
        if sys.platform == "win32":
            raise RuntimeError("the service needs Linux or macOS")
        output = _Output()
        async with AsyncExitStack() as stack:
            scratch = tempfile.TemporaryDirectory(prefix="runner-", dir=work, ignore_cleanup_errors=True)
            environment = {**os.environ, "TMPDIR": stack.enter_context(scratch)}
            ours, theirs = map(stack.enter_context, socket.socketpair())
            read, write = map(stack.enter_context, socket.socketpair())  # not a pipe: uvloop closes pipes twice
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MESSAGE_BYTES)
            stack.push_async_callback(_close, writer)
            transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: output, sock=read)
            stack.push_async_callback(output.closed.wait)
            stack.callback(transport.close)
            starting = asyncio.create_task(_start(theirs.fileno(), write.fileno(), environment))
            stack.push_async_callback(_kill, starting)
            process = await asyncio.shield(starting)  # if cancelled meanwhile, uvloop would never return
            theirs.close()  # now only the process has it, so that end of file means the end of the process
            write.close()
            yield cls(process, reader, writer, output)

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message. If the process is gone, `receive` reports it."""
        self._output.begin()
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self, seconds: float | None) -> dict[str, Any]:
        """Returns the next message.

        Raises:
            RunnerLost: hung after `seconds` without a message; crashed if the process is gone; refused if it says so.
        """
        try:
            async with asyncio.timeout(seconds):
                line = await self._reader.readline()
        except TimeoutError:
            raise self.hung(seconds or 0.0) from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.ended = True
            raise await self.lost()
        message: dict[str, Any] = json.loads(line)
        if message["say"] == "ended":
            self.ended = True
            raise await self.lost(message["message"], message["refusal"])
        return message

    def hung(self, seconds: float) -> RunnerLost:
        """Returns the error for a process that is silent for too long."""
        return RunnerLost("hung", f"the runner said nothing for {seconds:g} s", self._output.lines)

    async def lost(self, how: str | None = None, refusal: dict[str, str] | None = None) -> RunnerLost:
        """Returns the error for a process that has sent its last message.

        Args:
            how: how the process ended, in its own words; None derives it from the exit code.
            refusal: the error that keeps every process from loading, as `refusal_of` in `process_main.py` describes it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
                await self._output.closed.wait()
        message = f"the runner {how or _how(self._process.returncode)}"
        if refusal is None:
            return RunnerLost("crashed", message, self._output.lines)
        error = REFUSALS[refusal["kind"]](refusal["field"], refusal["reason"], refusal["remedy"])
        return RunnerLost("refused", message, self._output.lines, error)


class _Output(asyncio.Protocol):
    """Logs the output of a process line by line, and keeps the last lines."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._last: deque[str] = deque(maxlen=LINES_KEPT)
        self._rest = b""
        self._logged = 0

    def begin(self) -> None:
        """The process gets a message: the lines that follow are counted anew."""
        self._logged = 0

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(self._last)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        if len(self._rest) > LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._take(line)

    def connection_lost(self, _: Exception | None) -> None:
        self._take(self._rest)
        self.closed.set()

    def _take(self, line: bytes) -> None:
        if text := line[:LINE_BYTES].decode(errors="replace").rstrip():
            self._last.append(text)
            self._logged += 1
            if self._logged <= LINES_LOGGED:
                log.info("%s", text)
            elif self._logged == LINES_LOGGED + 1:
                log.warning("the runner wrote more than %d lines; the next ones are not logged", LINES_LOGGED)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _start(channel: int, output: int, environment: dict[str, str]) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-u", "-P", "-m", f"{__package__}.process_main", str(channel)),
        stdin=DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[channel],
        start_new_session=True,  # Ctrl-C in a terminal is meant for the server
        env=environment,
    )


async def _kill(starting: asyncio.Task[Process]) -> None:
    with suppress(OSError):  # it did not start
        process = await starting
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _how(code: int | None) -> str:
    if code is None:
        return "closed its socket"
    if code >= 0:
        return f"ended with code {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"was ended by {name}" + (", which the system sends if memory runs out" if name == "SIGKILL" else "")
