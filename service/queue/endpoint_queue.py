"""What the server knows of an endpoint's queue without asking the store: whether it has changed, and its places."""

import asyncio

from ..store import SqlStore
from .queue_positions import QueuePositions


class EndpointQueue:
    """The waiting requests of an endpoint.

    Args:
        store: holds them.
        endpoint: its name.

    Attributes:
        arrived: set if a request may be ready to begin.
        changes: counts what may add to the waiting requests or change their order.
        positions: how many requests wait ahead of each.
    """

    def __init__(self, store: SqlStore, endpoint: str) -> None:
        self.endpoint = endpoint
        self.arrived = asyncio.Event()
        self.changes = 0
        self.positions = QueuePositions(store, endpoint)

    def changed(self) -> None:
        """Tells that requests have come, or moved up."""
        self.changes += 1
        self.positions.changed = True
        self.arrived.set()
