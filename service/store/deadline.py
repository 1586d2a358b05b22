"""How long calls of the database may take while the server ends."""

import math
import time
from dataclasses import dataclass

LAST_SECONDS = 2.0
"""Longest wait for an answer once the server should have ended."""


@dataclass(slots=True)
class Deadline:
    """When the server should have ended, as `time.monotonic`."""

    at: float = math.inf

    def end(self, start: float, usual: float) -> float:
        """Returns when a wait ends that began at `start`: after `usual` seconds, or earlier if the server is ending."""
        return min(start + usual, max(self.at, start + LAST_SECONDS))

    def left(self, usual: float) -> float:
        """Returns how many seconds a wait that begins now may take."""
        now = time.monotonic()
        return self.end(now, usual) - now
