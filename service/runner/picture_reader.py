"""Reads keyframes in processes of their own, with a limit of time.

A process reads the files of one request and ends. From the first one on, or with `serve --warm` from the start on, the
next process is started ahead: it has imported everything when its order comes, which takes longer than the pictures.
"""

import asyncio
import contextlib
import errno
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from .interface import JobFailed

AT_ONCE = 2
"""Most processes at once; a key has one."""


class PictureReader:
    """Turns keyframe files into PNGs in the clip's size.

    Args:
        max_pixels: pixels of the largest file.
        seconds: longest time for the files of one request.
    """

    def __init__(self, max_pixels: int, seconds: float) -> None:
        self._max_pixels = max_pixels
        self._seconds = seconds
        self._free = asyncio.Semaphore(AT_ONCE)
        self._of_key: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._next: asyncio.Task[Process] | None = None

    async def read(self, key_id: str, files: Sequence[Path], size: tuple[int, int] | None, resample: str) -> None:
        """Replaces the files. Cancelling the task ends the process at once.

        Args:
            key_id: the API key, so that one key does not take all processes.
            files: of one request.
            size: width and height of the clip; None if no model is loaded yet, so that the pictures keep theirs.
            resample: as `runtime.images.fit` takes it.

        Raises:
            JobFailed: invalid; `keyframe` is the place of the file that is no image or takes too long.
            OSError: the disk is full.
        """
        width, height = size or (None, None)
        order = {"files": [str(file) for file in files], "max_pixels": self._max_pixels}
        order |= {"width": width, "height": height, "resample": resample}
        of_key = self._of_key.setdefault(key_id, asyncio.Lock())
        async with of_key, self._free:
            last = await self._run(json.dumps(order))
        if "full" in last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if "done" not in last:
            late = f"takes longer than {self._seconds:g} seconds to read"
            raise JobFailed("invalid", last.get("wrong", f"image: {late}"), keyframe=last.get("place", 0))

    def start_ahead(self) -> None:
        """Starts a process before the first request, which would wait for its imports otherwise."""
        self._next = asyncio.create_task(_start(), name="the next reader of keyframes")

    async def close(self) -> None:
        """Ends the process that was started ahead."""
        if self._next is not None:
            ahead, self._next = self._next, None
            with contextlib.suppress(OSError):  # it could not be started
                await _end(await ahead)

    async def _process(self) -> Process:
        """Returns a process that waits for its order, and starts the next one."""
        ahead, self._next = self._next, None
        process = None
        if ahead is not None:
            with contextlib.suppress(OSError):
                process = await ahead
        if process is None or process.returncode is not None:  # it could not be started, or somebody ended it
            process = await _start()
        self.start_ahead()
        return process

    async def _run(self, order: str) -> dict[str, Any]:
        """Returns the last message of a process."""
        last: dict[str, Any] = {}
        process = await self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    process.stdin.write(order.encode() + b"\n")
                    with contextlib.suppress(ConnectionError):
                        await process.stdin.drain()
                    async for line in process.stdout:
                        last = json.loads(line)
                    await process.wait()
                    if "done" not in last:  # it ended by itself
                        last.setdefault("wrong", "image: cannot be read")
        finally:
            await _end(process)
        return last


async def _start() -> Process:
    command = (sys.executable, "-P", "-m", f"{__package__}.picture_main")
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await asyncio.shield(process.wait())
