"""The time of event loops, which tests let pass: nothing depends on how quick the machine is."""

import asyncio
import time


def pass_on(seconds: float) -> None:
    """Lets time pass for the timers of the running event loop, besides the time that passes by itself."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


class StillTime:
    """The time of the running event loop, which stands still from now on. Its methods are for other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time()
        self._loop.time = lambda: self._now  # type: ignore[method-assign]

    def pass_on(self, seconds: float) -> None:
        """Lets time pass, and returns once the timers that ran out have been called."""

        async def passing() -> None:
            self._now += seconds
            for _ in range(4):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(passing(), self._loop).result()

    def go_on(self) -> None:
        """Lets time pass by itself again."""
        ahead = self._now - time.monotonic()
        self._loop.call_soon_threadsafe(setattr, self._loop, "time", lambda: time.monotonic() + max(0.0, ahead))
