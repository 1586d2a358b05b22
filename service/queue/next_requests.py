"""The next requests of the queue, read from the store only if they may have changed or few are left."""

import time
from collections.abc import Collection
from itertools import islice

from .. import clock
from ..store import SqlStore
from .endpoint_queue import EndpointQueue

OWN_SECONDS, SHARED_SECONDS = 1.0, 0.02
"""How long what was read counts if nobody tells of a change; the second if other servers use the store, too."""


class NextRequests:
    """The requests of an endpoint that begin next, in order.

    Args:
        store: has the order.
        queue: tells of changes.
    """

    def __init__(self, store: SqlStore, queue: EndpointQueue) -> None:
        self._store = store
        self._queue = queue
        self._found: dict[str, str] = {}
        self._all = False  # whether these are all that wait
        self._basis: tuple[int, frozenset[str], frozenset[str]] | None = None
        self._read_at = 0.0

    async def first(self, count: int, known: Collection[str], without_keys: Collection[str]) -> dict[str, str]:
        """Returns the next `count` requests that may still be started, in order: request id -> API key.

        Args:
            count: most requests to return.
            known, without_keys: as `SqlStore.ahead` takes them.
        """
        store, basis = self._store, (self._queue.changes, frozenset(known), frozenset(without_keys))
        old = time.monotonic() - self._read_at > (SHARED_SECONDS if store.shared else OWN_SECONDS)
        if old or basis != self._basis or not (self._all or len(self._found) >= count):
            self.forget()  # if the store fails
            order = (self._queue.endpoint, 2 * count, clock.now(), known, without_keys)
            self._found = await store.read(store.ahead, *order)
            self._basis, self._read_at, self._all = basis, time.monotonic(), len(self._found) < 2 * count
        return dict(islice(self._found.items(), count))

    def drop(self, request_id: str) -> None:
        """Leaves out a request that has begun."""
        self._found.pop(request_id, None)

    def forget(self) -> None:
        """Drops what was read, because something is not as it said."""
        self._basis = None
