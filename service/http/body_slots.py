"""How many bodies are received to disk at once: uploads, parts of uploads, and large inputs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from ..protocol.errors import ServiceError

WAITING = 4
"""How many wait for each slot. The connection of each may hold 256 KiB of its body already."""
RETRY_SECONDS = 5


class BodySlots:
    """Bounds the bodies in progress, and those that wait for their turn. fal's clients send a refused one again.

    Args:
        total: most bodies at once.
        key_total: most bodies of one API key at once.
        seconds: longest wait.
    """

    def __init__(self, total: int, key_total: int, seconds: float) -> None:
        self._all = _Slots(total)
        self._key_total = key_total
        self._of_key: WeakValueDictionary[str, _Slots] = WeakValueDictionary()
        self._seconds = seconds

    @asynccontextmanager
    async def hold(self, key_id: str) -> AsyncIterator[None]:
        """Waits for a slot and holds it until the block ends.

        Raises:
            ServiceError: 429 if none is free in time, or too many wait already.
        """
        of_key = self._of_key.setdefault(key_id, _Slots(self._key_total))
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._seconds):
                    await held.enter_async_context(of_key)
                    await held.enter_async_context(self._all)
            except TimeoutError:
                raise _too_many() from None
            yield


class _Slots:
    def __init__(self, slots: int) -> None:
        self._free = asyncio.Semaphore(slots)
        self._places = slots * (1 + WAITING)

    async def __aenter__(self) -> None:
        if not self._places:
            raise _too_many()
        self._places -= 1
        try:
            await self._free.acquire()
        except BaseException:
            self._places += 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._places += 1
        self._free.release()


def _too_many() -> ServiceError:
    headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
    return ServiceError(429, "Too many uploads at once", "too_many_uploads", headers)
