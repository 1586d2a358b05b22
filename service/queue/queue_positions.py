"""How many requests wait ahead of each, for polling clients: read from the store a few times a second at most."""

import time

from ..store import STORE_FAILURES, SqlStore

ORDER_SECONDS = 0.2
"""Longest age of the order of the queue."""


class QueuePositions:
    """The places of the waiting requests of an endpoint.

    Args:
        store: has the order.
        endpoint: its name.

    Attributes:
        changed: whether the order may have changed since it was read.
    """

    def __init__(self, store: SqlStore, endpoint: str) -> None:
        self.changed = True
        self._store = store
        self._endpoint = endpoint
        self._places: dict[str, int] = {}
        self._read_at = 0.0

    def known(self, request_id: str) -> int | None:
        """Returns how many requests wait ahead of a waiting one; None if only the store knows."""
        if self.changed and time.monotonic() - self._read_at > ORDER_SECONDS:
            return None
        return self._places.get(request_id)

    async def of(self, request_id: str) -> int:
        """Returns how many requests wait ahead of a waiting one; while the store fails, as last known."""
        position = self.known(request_id)
        if position is None:
            self.changed, self._read_at = self._store.shared, time.monotonic()
            try:
                ids = await self._store.read(self._store.waiting, self._endpoint)
            except STORE_FAILURES:
                self.changed = True
                return self._places.get(request_id, len(self._places))
            self._places = {waiting: place for place, waiting in enumerate(ids)}
        return self._places.get(request_id, 0)
