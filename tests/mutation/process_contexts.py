"""A plugin of coverage: in processes that tests start, lines get the test that runs as their context."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import coverage

SWITCH_SECONDS = 0.05
"""A process notices the next test after this time."""
SAVE_SECONDS = 0.5
"""A process that is killed loses what it ran in this time."""


def coverage_init(_: object, options: dict[str, Any]) -> None:
    """Called when the measurement of a process begins, also in a fork."""
    if os.getpid() != int(options["main"]):  # the tests' own process switches by itself
        threading.Thread(target=_follow, args=[Path(options["current"])], daemon=True).start()


def _follow(current: Path) -> None:
    test, saved = "", 0.0
    while True:
        measured = coverage.Coverage.current()
        with suppress(OSError, coverage.CoverageException):
            running = current.read_text()
            if measured is not None and (running != test or time.monotonic() > saved + SAVE_SECONDS):
                measured.switch_context(running)  # saves the lines of the context before
                test, saved = running, time.monotonic()
        time.sleep(SWITCH_SECONDS)
