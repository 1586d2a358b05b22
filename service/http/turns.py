"""The order in which the waiting requests of all connections begin."""

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """Begins one waiting request in each turn of the event loop.

    Clients that send many requests without waiting for the answers would fill every turn of the loop: others, whose
    requests need several turns, would wait for an answer to each of them in each turn.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, begin: Callable[[], None]) -> None:
        """Calls `begin` when all that were added earlier have been called."""
        self._waiting.append(begin)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        begin = self._waiting[0]
        try:
            begin()
        finally:
            self._waiting.popleft()
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._next)
