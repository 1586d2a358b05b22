"""A thread for calls that must all be made by the same one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any


class OneThread:
    """Makes calls on one thread of its own, in order. The caller waits for each."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function; raises what it raises."""
        future = self._pool.submit(function, *arguments)
        try:
            return future.result()
        finally:
            wait((future,))  # if Ctrl-C interrupts, the caller frees memory that the call still uses
