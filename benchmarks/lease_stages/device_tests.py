"""The tests of tests/gpu: on torch's engines in the stage `tests`, on installed backends in `backend-tests`."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime.backends import BACKENDS, availability

from .processes import CannotRun, Settings, Write

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"
FILES = ("requests", "events", "engines", "refit", "memory")
"""In the order of their worth."""


def measure(settings: Settings, write: Write) -> None:
    """Writes a row for each test that ran, then the number of those that were skipped, by reason.

    Raises:
        RuntimeError: tests failed.
    """
    chosen = "torch" if settings.stage == "tests" else "not torch"
    if chosen != "torch" and not any(backend.on_gpu and can_run(name) for name, backend in BACKENDS.items()):
        raise CannotRun("no GPU backend is installed")
    files = [str(TESTS / f"test_device_{name}.py") for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}", *([] if settings.dry_run else ["-k", chosen])]
    os.chdir(TESTS.parent.parent)
    outcomes = Outcomes(write)
    code = pytest.main([*options, *files], plugins=[outcomes])
    write({"outcomes": dict(outcomes.counts), "skipped": dict(outcomes.skipped)})
    if code:
        raise RuntimeError(f"{outcomes.counts['failed']} tests failed, pytest ended with code {int(code)}")


def can_run(backend: str) -> bool:
    """Whether a backend can run here."""
    return availability(backend).reason is None


class Outcomes:
    """A plugin of pytest that writes each outcome at once."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self.counts["skipped"] += 1
            self.skipped[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
        elif report.failed or report.when == "call":
            outcome = "failed" if report.failed else "passed"
            self.counts[outcome] += 1
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = {"reason": crash.message.splitlines()[0]} if crash is not None else {}
            test = report.nodeid.rpartition("/")[2]
            self.write({"test": test, "outcome": outcome, "test_s": round(report.duration, 3)} | reason)
