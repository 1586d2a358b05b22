"""All that works on requests: a dispatcher for each endpoint, and the periodic work of the server."""

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from ..components import Service
from ..json_logs import logs_of
from ..runner.picture_reader import PictureReader
from .dispatcher import Dispatcher
from .periodic_work import work_forever

log = logging.getLogger("sparsectrl_lcm.service")


class Dispatchers:
    """The dispatchers of a service."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self._service = service
        self._pictures = PictureReader(settings.image_pixels, settings.image_seconds)
        endpoints = service.endpoints.items()
        self._all = {name: Dispatcher(service, endpoint, self._pictures) for name, endpoint in endpoints}
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts. Requests that an earlier process left running wait again, unless their callers are gone."""
        left = await self._service.board.give_back(others=False)
        await self._service.board.end_runs()
        if left:
            log.info("requests that were interrupted run again", extra={"requests": left})
        await self._warn_of_other_endpoints()
        if self._service.settings.warm is not None:
            self._pictures.start_ahead()
        for name, dispatcher in self._all.items():
            with logs_of(endpoint=name):
                dispatcher.start()
        self._ticker = asyncio.create_task(work_forever(self._service), name="tick")

    async def _warn_of_other_endpoints(self) -> None:
        """Logs whose requests would wait for ever, as after a start without an endpoint that the last one had."""
        store = self._service.store
        if store.shared:  # another server may have them
            return
        if left := await store.read(store.waiting_elsewhere, self._all.keys()):
            log.warning("requests wait for endpoints that this server does not have", extra={"requests": left})

    async def drain(self, seconds: float) -> None:
        """Begins nothing more, waits for running requests and puts the rest back into the queue. May be repeated."""
        service, end = self._service, time.monotonic() + seconds
        service.draining = True
        service.store.deadline.at = min(service.store.deadline.at, end)
        await asyncio.gather(*(dispatcher.drain(end) for dispatcher in self._all.values()))
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None
        await self._pictures.close()
        if service.owner_lock.problem is not None:
            return  # the requests of this server's name are the other's
        try:
            await service.board.give_back(others=False)
        except SQLAlchemyError as error:  # the next start does it again
            log.warning("the store failed: %s", error)
