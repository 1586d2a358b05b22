"""Connections that cannot be accepted, since the process has no file descriptor left: told in one line a minute."""

import asyncio
import logging
import time
from typing import Any

QUIET_SECONDS = 60.0
ACCEPT_FAILED = "socket.accept() out of system resource"
"""What asyncio calls this. It waits for a second, and reports it once for each entry of the listener's backlog."""

log = logging.getLogger("sparsectrl_lcm.service.http")


class AcceptFailures:
    """An event loop's exception handler. Everything else goes to asyncio's own."""

    def __init__(self) -> None:
        self._told_at = -QUIET_SECONDS

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs what failed."""
        if context.get("message") != ACCEPT_FAILED:
            return loop.default_exception_handler(context)
        if time.monotonic() - self._told_at >= QUIET_SECONDS:
            self._told_at = time.monotonic()
            log.error("no connection is accepted, tried again each second: %s", context.get("exception"))
