"""Ctrl-C while clips are made: it ends the graph that runs; pressed again, it ends the process."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from ..runtime.cpu.graph_runs import RUNS
from ..runtime.output.writers import remove_unfinished

EXIT_CODE = 130
"""Of a process that Ctrl-C ended, as shells have it."""
STOP_EVERY = 0.05
"""Seconds between two attempts to end the graph that runs."""
TOLD_AFTER = 0.3
"""Seconds after which the user is told that the work goes on: a library cannot be interrupted."""
GRACE = 0.2
"""Seconds that a block which is ending gets after Ctrl-C was pressed again."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends the block with KeyboardInterrupt on Ctrl-C, and the process if it is pressed again, with exit code 130.

    While a library computes, Python handles no signals on the main thread. Another thread is told of them through a
    socket: it ends the graph that runs, and says "stopping" if that does not help.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread may set a handler, and an ignored signal stays ignored
        return
    handler, pressed = before, threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not pressed.is_set():  # later ones must not disturb what the first one began
            pressed.set()
            handler(number, frame)

    ours, python = socket.socketpair()
    python.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(ours,), name="ctrl-c", daemon=True)
    watcher.start()
    woken_before = signal.set_wakeup_fd(python.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:  # such as that of the graph which was ended
        if pressed.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(woken_before)
        python.close()  # ends the watcher
        watcher.join()
        ours.close()
        RUNS.resume()


def _watch(signals: socket.socket) -> None:
    """Waits for Ctrl-C until the block ends."""
    if not _pressed(signals, None):
        return
    start, told = time.monotonic(), False
    while True:
        RUNS.stop()
        again = _pressed(signals, STOP_EVERY)
        if again is False:
            return
        if again:
            break
        if not told and time.monotonic() - start > TOLD_AFTER:
            told = True
            print("stopping; press Ctrl-C again to end at once", file=sys.stderr, flush=True)
    if _pressed(signals, GRACE) is not False:
        _end_process()


def _pressed(signals: socket.socket, seconds: float | None) -> bool | None:
    """Whether Ctrl-C was pressed, or the block has ended instead; None if neither happened for so many seconds."""
    signals.settimeout(seconds)
    try:
        while received := signals.recv(1):
            if received[0] == signal.SIGINT:
                return True
    except TimeoutError:
        return None
    return False


def _end_process() -> None:
    """Ends the process while a library computes."""
    remove_unfinished()
    Console(stderr=True).show_cursor()  # the bar has hidden it
    print("stopped", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
