"""The state of every request, for routes and dispatcher: the store, and views in memory that make polling cheap."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from .. import clock
from ..metrics import Metrics
from ..protocol.errors import not_found
from ..protocol.extended_input import ExtendedInput
from ..store import STORE_FAILURES, Change, FileRow, LogRow, NewRequest, Outcome, RequestRow, SqlStore, Submitted
from .endpoint_queue import EndpointQueue
from .retries import until_the_store_works
from .views import View

T = TypeVar("T")
KEPT_VIEWS = 5_000
SHARED_SECONDS = 0.25
"""Longest age of a view if other servers write to the same store."""


class Board:
    """Requests by id. All methods belong to the event loop.

    Args:
        store: holds the authoritative state.
        owner: the name under which this server claims requests.
        metrics: counts every ended request.
        endpoints: the endpoints that this server works on.
        unstarted_limit: as `SqlStore.submit` takes it.

    Attributes:
        queues: the queue of each endpoint, by its name.
    """

    def __init__(
        self, store: SqlStore, owner: str, metrics: Metrics, endpoints: Iterable[str], unstarted_limit: int = 2000
    ) -> None:
        self.owner = owner
        self.queues = {name: EndpointQueue(store, name) for name in endpoints}
        self._store = store
        self._metrics = metrics
        self._unstarted_limit = unstarted_limit
        self._views: OrderedDict[str, View] = OrderedDict()
        self._running: dict[str, View] = {}  # requests that run here; no other server changes them
        self._written: dict[str, int] = {}  # number of their log lines in the store
        self._writing = asyncio.Lock()  # for writes that depend on the two above, or change them
        self._loads: dict[str, asyncio.Task[View | None]] = {}
        self._changed_while_loading: set[str] = set()

    async def submit(self, new: NewRequest, outcome: Outcome | None = None, **limits: int) -> Submitted:
        """Adds a request as `SqlStore.submit` does."""
        new = replace(new, home=self.owner if new.kind == "run" else None)
        limits["unstarted_limit"] = self._unstarted_limit
        made = await self._store.write(self._store.submit, new, **limits, outcome=outcome)
        if outcome is not None and made.is_new:
            self._count(new.endpoint, outcome.status)
        self.queues[new.endpoint].changed()
        return made

    def known(self, request_id: str) -> View | None:
        """Returns the view of a request if an up-to-date one is in memory, otherwise None."""
        if request_id in self._running:
            return self._running[request_id]
        view = self._views.get(request_id)
        if view is None or (self._store.shared and self._stale(view)):
            return None
        return view

    async def view(self, request_id: str, key_id: str) -> View:
        """Returns the view of a request.

        Raises:
            ServiceError: 404 if there is none, or it belongs to another key.
        """
        view = self.known(request_id) or await self._load(request_id)
        view = self._running.get(request_id, view)  # it may have been claimed meanwhile
        if view is None or view.row.key_id != key_id:
            raise not_found()
        return view

    async def refreshed(self, view: View) -> View:
        """Returns the newest view of a request; while the store fails, the given one, so that streams go on later."""
        try:
            return await self.view(view.row.id, view.row.key_id)
        except STORE_FAILURES:
            return view

    async def change(self, view: View, seconds: float) -> None:
        """Waits up to `seconds` for the next change of a request."""
        if self._store.shared and view.row.id not in self._running:
            seconds = min(seconds, SHARED_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await view.changed.wait()
        except TimeoutError:
            return

    async def input_of(self, request_id: str) -> tuple[ExtendedInput, str] | None:
        """Returns input and base URL of a waiting request.

        The input was checked before it was stored. An earlier release stored it as the client sent it, with numbers
        as text, for example.
        """
        found = await self._store.read(self._store.given, request_id)
        return None if found is None else (ExtendedInput.model_validate(found[0]), found[1])

    async def counts(self, endpoint: str) -> dict[str, int]:
        """Returns how many requests of an endpoint are `queued` and `running`."""
        return await self._store.read(self._store.counts, endpoint)

    async def claim(self, request_id: str, lease_seconds: float, clip: FileRow | None = None) -> View | None:
        """Claims a request. `log` and `show` may change its view until `finish` or `put_back`.

        `clip` is as `SqlStore.claim` takes it.
        """
        now = clock.now()
        async with self._writing:
            taken = await self._store.write(self._store.claim, request_id, self.owner, now, lease_seconds, clip)
            if taken is None:
                return None
            view = self._running[request_id] = View(*taken, time.monotonic(), clip)
            self._written[request_id] = len(view.logs)
        self.queues[view.row.endpoint].positions.changed = True
        self._forget_views(request_id)
        return view

    def log(self, view: View, message: str, level: str = "INFO", labels: dict[str, str] | None = None) -> None:
        """Adds a line to the log of a request that runs here. The store gets it at the next `renew`."""
        view.logs.append(LogRow(message, level, clock.now(), labels or {}))
        view.wake()

    def show(self, view: View, preview: bytes) -> None:
        """Sets the preview of a request that runs here."""
        view.preview = preview
        view.wake()

    async def renew(self, lease_seconds: float) -> list[RequestRow]:
        """Extends the leases and writes new log lines. Returns the records of requests to stop."""
        async with self._writing:
            held = dict(self._running)
            lines = {request_id: self._unwritten(view) for request_id, view in held.items()}
            rows = [(view.row, lines[request_id]) for request_id, view in held.items()]
            stop = await self._store.write(self._store.renew, rows, lease_seconds) if rows else set()
            for request_id, view in held.items():
                if self._running.get(request_id) is view:
                    self._written[request_id] += len(lines[request_id])
        stopped = [held[request_id] for request_id in stop if self._running.get(request_id) is held[request_id]]
        for view in stopped:
            view.cancelled = True
        return [view.row for view in stopped]

    async def finish(self, view: View, outcome: Outcome) -> int | None:
        """Ends a request that ran here. Returns its status, or None if it no longer belonged to this server."""
        ended = await self._let_go(
            view, lambda lines: self._store.finish(view.row, outcome, clock.now(), lines, view.clip)
        )
        if ended is not None:
            self._count(view.row.endpoint, ended)
        return ended

    async def put_back(self, view: View, *, crashed: bool) -> None:
        """Puts a request whose runner died here back into the queue. `crashed`: the request may be the cause."""
        ended = await self._let_go(
            view, lambda lines: self._store.put_back(view.row, lines, clock.now(), crashed=crashed, clip=view.clip)
        )
        if ended is not None:
            self._count(view.row.endpoint, ended)
        self.queues[view.row.endpoint].changed()

    def abandon(self, view: View) -> None:
        """Stops tracking a request without a write to the store; `give_back` finds it later."""
        if self._running.get(view.row.id) is view:
            del self._running[view.row.id], self._written[view.row.id]
            view.wake()
        self._forget_views(view.row.id)

    async def cancel(self, request_id: str, reason: str = "client_cancelled") -> bool:
        """Ends a waiting request, or marks a running one as cancelled. Returns False if it did neither."""
        done = await self._store.write(self._store.cancel, request_id, clock.now(), reason)
        if done is not None and done.status is not None:
            self._note(done)
        if request_id in self._running:
            self._running[request_id].cancelled = True
        else:
            self._forget_views(request_id)
        return done is not None

    async def give_back(self, *, others: bool) -> list[str]:
        """Puts requests that no server works on back into the queue. `others` is as `SqlStore.give_back` takes it."""
        async with self._writing:
            held, now = list(self._running), clock.now()
            given = await self._store.write(self._store.give_back, self.owner, held, now, others)
        self._note(*given)
        return [change.id for change in given]

    async def end_runs(self) -> None:
        """Ends runs whose callers were connected to an earlier process of this server."""
        self._note(*await self._store.write(self._store.end_runs, self.owner, clock.now()))

    async def expire_waiting(self) -> None:
        """Ends waiting requests that were not started in time, or whose API key was revoked."""
        now = clock.now()
        self._note(*await self._store.write(self._store.expire_waiting, now))
        self._note(*await self._store.write(self._store.end_revoked, now))

    async def forget(self, before: float, private_before: float) -> None:
        """Deletes all requests that ended long ago; calls `SqlStore.forget` until none is left."""
        while gone := await self._store.write(self._store.forget, before, private_before):
            self._forget_views(*gone)

    async def _load(self, request_id: str) -> View | None:
        task = self._loads.get(request_id)
        if task is None:
            task = self._loads[request_id] = asyncio.create_task(self._read(request_id), name=request_id)
            task.add_done_callback(self._loaded)
        return await asyncio.shield(task)

    def _loaded(self, task: "asyncio.Task[View | None]") -> None:
        del self._loads[task.get_name()]
        if not task.cancelled():
            task.exception()  # those who waited may all be gone

    async def _read(self, request_id: str) -> View | None:
        while True:
            self._changed_while_loading.discard(request_id)
            loaded_at = time.monotonic()
            row = await self._store.read(self._store.get, request_id)
            if row is None:
                return None
            logs = await self._store.read(self._store.logs, request_id)
            if request_id not in self._changed_while_loading:
                break
        view = View(row, logs, loaded_at)
        before = self._views.get(request_id)
        if before is not None:
            view.changed = before.changed
        self._views[request_id] = view
        self._views.move_to_end(request_id)
        while len(self._views) > KEPT_VIEWS:
            self._views.popitem(last=False)
        return view

    def _unwritten(self, view: View) -> list[LogRow]:
        return view.logs[self._written.get(view.row.id, 0) :]

    async def _let_go(self, view: View, write: Callable[[list[LogRow]], T]) -> T:
        """Writes the end of an attempt. Retries while the store fails: otherwise the request would stay running."""

        async def try_to_write() -> T:
            async with self._writing:
                return await self._store.write(write, self._unwritten(view))

        try:
            return await until_the_store_works(try_to_write)
        finally:
            self.abandon(view)

    def _count(self, endpoint: str, status: int) -> None:
        self._metrics.ended.labels(endpoint, str(status)).inc()

    def _note(self, *changes: Change) -> None:
        """Notes requests that ended while they waited, so that others of their keys move up, or that wait again."""
        for change in changes:
            if change.status is not None:
                self._count(change.endpoint, change.status)
            if change.endpoint in self.queues:  # other servers on the database may have other endpoints
                self.queues[change.endpoint].changed()
        self._forget_views(*(change.id for change in changes))

    def _forget_views(self, *request_ids: str) -> None:
        """Drops the views of requests that have changed in the store, and wakes all who wait for a change."""
        for request_id in request_ids:
            if request_id in self._loads:
                self._changed_while_loading.add(request_id)
            view = self._views.pop(request_id, None)
            if view is not None:
                view.wake()

    def _stale(self, view: View) -> bool:
        return view.row.state != "done" and time.monotonic() - view.loaded_at > SHARED_SECONDS
