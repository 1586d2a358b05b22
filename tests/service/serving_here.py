"""`serve` on the event loop of a test, with a stand-in for the runner."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.http.listeners import Listener
from sparsectrl_lcm.service.server import serve
from sparsectrl_lcm.service.settings import Settings

from .stand_in import StandIn
from .waiting import SECONDS


@asynccontextmanager
async def serving_here(
    settings: Settings,
    listener: Listener,
    on_open: Callable[[Service], None] = lambda _: None,
    on_loaded: Callable[[Service], None] = lambda _: None,
) -> AsyncIterator[Service]:
    """Serves; SIGTERM to this process ends the server, as it would in its own."""
    opened: asyncio.Future[Service] = asyncio.get_running_loop().create_future()

    def open_then(service: Service) -> None:
        on_open(service)
        opened.set_result(service)

    task = asyncio.ensure_future(serve(settings, [listener], [StandIn()], open_then, on_loaded))
    await asyncio.wait({task, opened}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    async with asyncio.timeout(SECONDS):
        yield opened.result()
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await task
