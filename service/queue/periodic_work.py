"""What a server does each second: probe the database, renew its leases, end and take over requests, measure."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ..components import Service
from ..store import STORE_FAILURES

TICK_SECONDS = 1.0

log = logging.getLogger("sparsectrl_lcm.service")


async def work_forever(service: Service) -> None:
    """Does the periodic work while the database works. During an outage it only probes it."""
    duties: tuple[Callable[[], Coroutine[Any, Any, object]], ...] = (
        lambda: _renew(service),
        service.board.expire_waiting,
        lambda: _take_over(service),
        lambda: _measure(service),
    )
    outage = service.store.outage
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(TICK_SECONDS):
                await outage.begun.wait()
        outage.begun.clear()
        if not await service.store.probe():
            continue
        try:
            await service.store.read(service.owner_lock.check)
            for duty in duties if service.owner_lock.problem is None else ():
                await duty()
            service.answered_at = time.monotonic()
        except Exception as error:
            if not isinstance(error, STORE_FAILURES):
                log.exception("the periodic work failed")


async def _renew(service: Service) -> None:
    for row in await service.board.renew(service.settings.lease_seconds):
        service.endpoints[row.endpoint].runner.cancel(row.id)  # cancelled at another server, or taken over by it


async def _take_over(service: Service) -> None:
    """Puts requests that no server works on back into the queue.

    After a start or an outage, the other servers first get time to renew their leases, which nobody could during an
    outage, and this server may have been started in one.
    """
    works_for = time.monotonic() - service.store.outage.works_since
    await service.board.give_back(others=works_for > service.settings.lease_seconds)


async def _measure(service: Service) -> None:
    metrics = service.metrics
    for name, endpoint in service.endpoints.items():
        counts = await service.board.counts(name)
        metrics.waiting.labels(name).set(counts["queued"])
        metrics.running.labels(name).set(counts["running"])
        for runner in endpoint.runner.runners:
            metrics.ready.labels(name, runner.name).set(runner.state in ("ready", "busy"))
            metrics.busy.labels(name, runner.name).set(runner.state == "busy")
