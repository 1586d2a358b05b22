"""Delivers webhooks: signed, independent of the requests, and retried for a limited time."""

import asyncio
import logging
import random
from collections import Counter
from contextlib import suppress
from typing import Any

import httpx

from .. import clock
from ..auth.callers import user_id
from ..components import Service
from ..protocol.responses import to_json
from ..store import STORE_FAILURES, RequestRow, WebhookRow
from .downloads import guarded_client
from .public_addresses import AddressRefused

TICK_SECONDS = 0.25
MOST, MOST_OF_KEY, AT_ONCE = 64, 16, 8
"""Most deliveries that run at once: in total, of one API key, and (approximately) to one host."""

RECORD_SECONDS = 1.0
"""Wait before an attempt is recorded again while the store fails."""

log = logging.getLogger("sparsectrl_lcm.service")


class Webhooks:
    """Calls the webhooks of requests that have ended. The list is in the store, so that no crash loses one."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._task: asyncio.Task[None] | None = None
        self._running: dict[asyncio.Task[None], WebhookRow] = {}
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Begins to deliver."""
        self._task = asyncio.ensure_future(self._deliver())

    async def stop(self) -> None:
        """Stops. Running deliveries are repeated later."""
        if self._task is not None:
            tasks = [*self._running, self._task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self) -> None:
        settings = self.service.settings
        async with guarded_client(settings.allow_private, seconds=settings.webhook_seconds) as client:
            while True:
                self._ended.clear()
                try:
                    due = await self._due()
                except STORE_FAILURES:
                    due = []
                for row in due:
                    task = asyncio.create_task(self._one(client, row))
                    self._running[task] = row
                    task.add_done_callback(self._end)
                if len(due) < AT_ONCE:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(TICK_SECONDS):
                            await self._ended.wait()

    async def _due(self) -> list[WebhookRow]:
        """Returns the deliveries to begin now. Slow receivers, and keys with many of them, leave room for others.

        A key gets no more than half of the room that is left, so that there is always some for the next key.
        """
        room = min(AT_ONCE, MOST - len(self._running))
        if room <= 0:
            return []
        rows = list(self._running.values())
        key_limit = max(1, min(MOST_OF_KEY, (MOST - len(rows)) // 2))
        busy = [host for host, count in Counter(row.host for row in rows).items() if count >= AT_ONCE]
        store = self.service.store
        hold = 4 * self.service.settings.webhook_seconds
        most = max(hold, 2 * self.service.settings.webhook_wait_seconds)
        return await store.write(store.due_webhooks, clock.now(), hold, room, busy, rows, key_limit, most)

    def _end(self, task: "asyncio.Task[None]") -> None:
        del self._running[task]
        self._ended.set()
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, STORE_FAILURES):  # the delivery is due again soon
            log.error("a webhook failed", exc_info=error)

    async def _one(self, client: httpx.AsyncClient, row: WebhookRow) -> None:
        settings, store = self.service.settings, self.service.store
        error, final = None, False
        request = await store.read(store.get, row.request_id)
        if request is None:
            return
        try:
            async with asyncio.timeout(settings.webhook_seconds):
                status, final = await self._post(client, row, request)
            if not 200 <= status < 300:
                error = f"HTTP {status}"
        except Exception as failure:  # every failure of a receiver counts as an attempt
            error, final = type(failure).__name__, isinstance(failure, AddressRefused)
            if not isinstance(failure, httpx.HTTPError | httpx.InvalidURL | TimeoutError | OSError):
                log.exception("a webhook failed", extra={"request_id": row.request_id})
        self.service.metrics.webhooks.labels("delivered" if error is None else "failed").inc()
        again = error is not None and not final and row.attempt < settings.webhook_attempts
        wait = min(settings.webhook_wait_seconds, 2.0 ** (row.attempt - 1)) * random.uniform(0.8, 1.2)
        if error is not None:
            about = {"request_id": row.request_id, "attempts": row.attempt, "again": again}
            log.warning("a webhook was not delivered: %s", error, extra=about)
        while True:  # what was delivered should not be delivered again
            with suppress(*STORE_FAILURES):
                return await store.write(store.webhook_tried, row, error, clock.now() + wait if again else None)
            await asyncio.sleep(RECORD_SECONDS)

    async def _post(self, client: httpx.AsyncClient, row: WebhookRow, request: RequestRow) -> tuple[int, bool]:
        """Returns the status of the response, and whether a retry is useless (redirects are not followed)."""
        body = to_json(payload(request))
        headers = self.service.signer.headers(request.id, user_id(request.key_id), body)
        headers |= {"Content-Type": "application/json", "X-Webhook-Attempt": str(row.attempt)}
        async with client.stream("POST", row.url, content=body, headers=headers) as response:
            return response.status_code, response.is_redirect


def payload(request: RequestRow) -> dict[str, Any]:
    """Returns the body of a webhook."""
    outcome = request.outcome
    body: dict[str, Any] = {"request_id": request.id, "gateway_request_id": request.id, "status": "OK"}
    if outcome is None or outcome.error is not None:
        status = 500 if outcome is None else outcome.status
        body |= {"status": "ERROR", "error": f"Invalid status code: {status}"}
    return body | {"payload": None if outcome is None else outcome.body}
