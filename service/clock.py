"""The time of day, in seconds since 1970, without the jumps of a clock that somebody sets."""

import logging
import time
from collections.abc import Callable

JUMP_SECONDS = 30.0
"""A smaller step is followed at once."""
HELD_SECONDS = 3600.0
"""How long a jump has to last before it counts: a wrong clock would delete results and end or delay what waits."""

log = logging.getLogger("sparsectrl_lcm.service")


class Clock:
    """A clock that goes on as before for `HELD_SECONDS` after the system's was set, and then follows it.

    Args:
        wall: the system's clock, which may be set.
        steady: seconds since any moment, which only grow.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._offset = wall() - steady()
        self._jumped_at: float | None = None

    def now(self) -> float:
        """Returns the time."""
        steady = self._steady()
        jump = self._wall() - steady - self._offset
        if abs(jump) < JUMP_SECONDS or self._has_lasted(steady):
            self._offset += jump
            self._jumped_at = None
        elif self._jumped_at is None:
            self._jumped_at = steady
            log.warning("the clock was set by %+.0f s; it counts in %g s, if it stays so", jump, HELD_SECONDS)
        return steady + self._offset

    def _has_lasted(self, steady: float) -> bool:
        return self._jumped_at is not None and steady - self._jumped_at > HELD_SECONDS


now = Clock().now
