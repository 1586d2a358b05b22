"""Makes Ctrl-C end a comparison even if a library swallows the KeyboardInterrupt.

Polygraphy imports torch when it first reads or writes a file, and catches everything while it does.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises KeyboardInterrupt at the end of the block at the latest, if Ctrl-C was pressed within it.

    Errors that the block raises after Ctrl-C give way to the KeyboardInterrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread may set a handler, and an ignored signal stays ignored
        return
    handler = before

    def stop(number: int, frame: FrameType | None) -> None:
        _asked.set()
        handler(number, frame)

    _asked.clear()
    signal.signal(signal.SIGINT, stop)
    try:
        yield
        check_stopped()
    except Exception as error:
        if _asked.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


def check_stopped() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed within `stoppable`."""
    if _asked.is_set():
        raise KeyboardInterrupt
