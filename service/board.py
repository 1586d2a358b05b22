"""The state of requests as routes and dispatcher see it: the store, and a view in memory that makes polling cheap."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from .errors import not_found
from .metrics import Metrics
from .schema import Input
from .store import LogRow, NewRequest, Outcome, RequestRow, SqlStore

T = TypeVar("T")
KEPT_VIEWS = 5_000
SHARED_SECONDS = 0.25
"""How old a view may be where other servers write into the same store."""
ORDER_SECONDS = 0.2
"""How old the order of the queue may be."""
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""Seconds until a store that fails is tried again; the wait doubles."""

log = logging.getLogger("sparsectrl_lcm.service")


@dataclass(slots=True)
class View:
    """What is known of a request.

    Attributes:
        preview: a JPEG of a frame, while the clip is made here.
        changed: set at the next change; a new one takes its place then.
    """

    row: RequestRow
    logs: list[LogRow]
    loaded_at: float
    preview: bytes | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Board:
    """Requests by id. All methods belong to the event loop; the store's work is done in threads of the board's own.

    Args:
        store: the truth.
        owner: the name under which this server takes requests.
        metrics: are told of every end.
        unstarted_limit: as `SqlStore.submit` takes it.
    """

    def __init__(self, store: SqlStore, owner: str, metrics: Metrics, unstarted_limit: int = 2000) -> None:
        self.store = store
        self.owner = owner
        self.arrived = asyncio.Event()
        self._metrics = metrics
        self._unstarted_limit = unstarted_limit
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="store")
        self._views: OrderedDict[str, View] = OrderedDict()
        self._mine: dict[str, View] = {}  # requests that run here; nobody else changes them
        self._written: dict[str, int] = {}  # how many lines of their logs the store has
        self._turn = asyncio.Lock()  # of writes that depend on, or change, what is in hand and what is written
        self._loads: dict[str, asyncio.Task[View | None]] = {}
        self._changed: set[str] = set()  # while they are loaded
        self._order: dict[str, int] = {}
        self._order_at = 0.0
        self._order_changed = True

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    async def call(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Runs a method of the store in a thread."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, lambda: function(*arguments, **keywords))

    async def submit(self, new: NewRequest, *, limit: int, key_limit: int, outcome: Outcome | None = None) -> None:
        """As `SqlStore.submit`, with what the schema knows of the input; the dispatcher wakes up."""
        known = {} if outcome else {name: value for name, value in new.input.items() if name in Input.model_fields}
        new = replace(new, input=known, home=self.owner if new.kind == "run" else None)
        limits = {"limit": limit, "key_limit": key_limit, "unstarted_limit": self._unstarted_limit}
        await self.call(self.store.submit, new, **limits, outcome=outcome)
        if outcome is not None:
            self._count(outcome.status)
        self._order_changed = True
        self.arrived.set()

    def known(self, request_id: str) -> View | None:
        """The view of a request where memory has one that is true now."""
        if request_id in self._mine:
            return self._mine[request_id]
        view = self._views.get(request_id)
        if view is None or (self.store.shared and self._stale(view)):
            return None
        return view

    def position(self, request_id: str) -> int | None:
        """How many requests wait ahead of one that waits; None where the order has to be asked for first."""
        if self._order_changed and time.monotonic() - self._order_at > ORDER_SECONDS:
            return None
        return self._order.get(request_id)

    async def view(self, request_id: str, key_id: str) -> View:
        """The view of a request.

        Raises:
            ServiceError: 404 where there is none, or it is another key's.
        """
        view = self.known(request_id) or await self._load(request_id)
        view = self._mine.get(request_id, view)  # it may have been taken meanwhile
        if view is None or view.row.key_id != key_id:
            raise not_found()
        return view

    async def queue_position(self, request_id: str) -> int:
        """How many requests wait ahead."""
        position = self.position(request_id)
        if position is None:
            self._order_changed, self._order_at = self.store.shared, time.monotonic()
            ids = await self.call(self.store.waiting)
            self._order = {waiting: place for place, waiting in enumerate(ids)}
        return self._order.get(request_id, 0)

    async def change(self, view: View, seconds: float) -> None:
        """Waits for the next change of a request, at most so long."""
        if self.store.shared and view.row.id not in self._mine:
            seconds = min(seconds, SHARED_SECONDS)
        try:
            await asyncio.wait_for(view.changed.wait(), seconds)
        except TimeoutError:
            return

    async def claim(self, request_id: str, lease_seconds: float) -> View | None:
        """Takes a request; its view may be changed by `log` and `show` until `finish` or `put_back`."""
        async with self._turn:
            taken = await self.call(self.store.claim, request_id, self.owner, time.time(), lease_seconds)
            if taken is None:
                return None
            view = self._mine[request_id] = View(*taken, time.monotonic())
            self._written[request_id] = len(view.logs)
        self._tell(request_id)
        return view

    def log(self, view: View, message: str, level: str = "INFO", labels: dict[str, str] | None = None) -> None:
        """Adds a line to the log of a request that runs here; the store has it soon after."""
        view.logs.append(LogRow(message, level, time.time(), labels or {}))
        _wake(view)

    def show(self, view: View, preview: bytes) -> None:
        """Gives a request that runs here a picture."""
        view.preview = preview
        _wake(view)

    async def renew(self, lease_seconds: float) -> list[str]:
        """Prolongs the leases, writes new lines of logs; the ids of requests that are to be stopped."""
        async with self._turn:
            held = dict(self._mine)
            lines = {request_id: self._unwritten(view) for request_id, view in held.items()}
            rows = [(view.row, lines[request_id]) for request_id, view in held.items()]
            stop = await self.call(self.store.renew, rows, lease_seconds) if rows else set()
            for request_id, view in held.items():
                if self._mine.get(request_id) is view:
                    self._written[request_id] += len(lines[request_id])
        return [request_id for request_id in stop if self._mine.get(request_id) is held[request_id]]

    async def finish(self, view: View, outcome: Outcome) -> int | None:
        """Ends a request that ran here; the status, None where it was no longer this server's."""
        ended = await self._let_go(
            view, lambda lines: self.store.finish(view.row, outcome, time.time(), lines), f"status {outcome.status}"
        )
        if ended is not None:
            self._count(ended)
        return ended

    async def put_back(self, view: View, *, crashed: bool) -> None:
        """Puts a request that ran here back into the queue."""
        ended = await self._let_go(
            view, lambda lines: self.store.put_back(view.row, lines, time.time(), crashed=crashed), "put back"
        )
        if ended is not None:
            self._count(ended)
        self.arrived.set()

    def abandon(self, view: View) -> None:
        """Lets go of a request without a word to the store; `give_back` finds it."""
        if self._mine.get(view.row.id) is view:
            del self._mine[view.row.id], self._written[view.row.id]
            _wake(view)
        self._tell(view.row.id)

    async def cancel(self, request_id: str, reason: str = "client_cancelled") -> bool:
        """Ends a request that waits, or marks one that runs; False where there was nothing to cancel."""
        done = await self.call(self.store.cancel, request_id, time.time(), reason)
        if done == "ended":
            self._count(499)
            self.arrived.set()
        if request_id not in self._mine:
            self._tell(request_id)
        return done is not None

    async def give_back(self) -> list[str]:
        """Puts requests that nobody has in hand back into the queue: after a crash, or where the store had failed."""
        async with self._turn:
            given = await self.call(self.store.give_back, self.owner, list(self._mine), time.time())
        for status in given.values():
            if status is not None:
                self._count(status)
        if given:
            self.told(list(given))
            self.arrived.set()
        return list(given)

    async def end_runs(self) -> None:
        """Ends runs whose callers were connected to an earlier life of this server."""
        self._all_ended(await self.call(self.store.end_runs, self.owner, time.time()), 499)

    async def expire_waiting(self) -> None:
        """Ends requests that were not started in time."""
        self._all_ended(await self.call(self.store.expire_waiting, time.time()), 504)

    def told(self, request_ids: Sequence[str]) -> None:
        """The store has changed these."""
        for request_id in request_ids:
            self._tell(request_id)

    async def _load(self, request_id: str) -> View | None:
        task = self._loads.get(request_id)
        if task is None:
            task = self._loads[request_id] = asyncio.ensure_future(self._read(request_id))
            task.add_done_callback(lambda _: self._loads.pop(request_id, None))
        return await asyncio.shield(task)

    async def _read(self, request_id: str) -> View | None:
        while True:
            self._changed.discard(request_id)
            loaded_at = time.monotonic()
            row = await self.call(self.store.get, request_id)
            if row is None:
                return None
            logs = await self.call(self.store.logs, request_id)
            if request_id not in self._changed:
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

    async def _let_go(self, view: View, write: Callable[[list[LogRow]], T], what: str) -> T:
        """Writes how a try ended, again and again while the store fails: else the request would stay as it is."""
        wait = FIRST_WAIT
        try:
            while True:
                try:
                    async with self._turn:
                        return await self.call(write, self._unwritten(view))
                except (OperationalError, InterfaceError, PoolTimeout) as error:
                    about = {"request_id": view.row.id, "seconds": wait}
                    log.warning("the store failed, and is tried again (%s): %s", what, error, extra=about)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        finally:
            self.abandon(view)

    def _count(self, status: int) -> None:
        self._metrics.ended.labels(str(status)).inc()

    def _all_ended(self, request_ids: Sequence[str], status: int) -> None:
        for _ in request_ids:
            self._count(status)
        self.told(request_ids)

    def _tell(self, request_id: str) -> None:
        self._order_changed = True
        if request_id in self._loads:
            self._changed.add(request_id)
        view = self._views.pop(request_id, None)
        if view is not None:
            _wake(view)

    def _stale(self, view: View) -> bool:
        return view.row.state != "done" and time.monotonic() - view.loaded_at > SHARED_SECONDS


def _wake(view: View) -> None:
    view.changed.set()
    view.changed = asyncio.Event()
