"""Work in a fork of this process, with an end to it and to every process that it started."""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of processes whose parent has ended, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def in_fork(work: Callable[[], int], seconds: float, output: Path) -> int | None:
    """Returns the status of `work` in a fork of this process; None if it took longer and was ended."""
    child = os.fork()
    if child == 0:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            os._exit(work())
        finally:
            os._exit(99)
    end = time.monotonic() + seconds
    while not (status := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    for started in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            started.kill()
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass
    return os.waitstatus_to_exitcode(status[1]) if status[0] else None
