"""Which tests run which lines, in the test's process and in those that it starts, and which of them try a mutant."""

import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import coverage
import psutil
import pytest
from mutants import Mutant
from process_contexts import SWITCH_SECONDS

Seconds = dict[str, tuple[float, float]]
"""Of each test that passed: of its fixtures, which may be those of its whole file, and of the rest."""


class Recorder:
    """Sets the context of the coverage to each test, and keeps which tests passed, and their seconds."""

    def __init__(self, measured: coverage.Coverage, current: Path) -> None:
        self._measured = measured
        self._current = current
        self._seconds: dict[str, Counter[bool]] = {}
        self.bad: set[str] = set()

    @property
    def passed(self) -> Seconds:
        rounded = {test: (round(spent[True], 2), round(spent[False], 2)) for test, spent in self._seconds.items()}
        return {test: spent for test, spent in rounded.items() if test not in self.bad}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self._measured.switch_context(item.nodeid)
        written = self._current.with_suffix(".new")
        written.write_text(item.nodeid)
        written.replace(self._current)
        if psutil.Process().children():  # let them notice
            time.sleep(2 * SWITCH_SECONDS)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent = self._seconds.setdefault(report.nodeid, Counter())
        spent[report.when == "setup"] += report.duration  # type: ignore[assignment]
        if not report.passed:
            self.bad.add(report.nodeid)


class CoveringTests:
    """Finds the tests of a mutant in what `Recorder` and coverage recorded."""

    def __init__(self, data: Path, passed: Seconds) -> None:
        combined = coverage.Coverage(data_file=str(data))
        combined.combine([str(data.parent)], keep=True)
        self._data = combined.get_data()
        self._passed = passed
        self._contexts: dict[str, dict[int, set[str]]] = {}
        self._start: Counter[str] = Counter()
        for test, (fixtures, _) in passed.items():
            self._start[_file(test)] = max(self._start[_file(test)], fixtures)  # type: ignore[assignment]

    def of(self, path: Path, mutant: Mutant) -> set[str]:
        """The tests that run a mutant's statement; those of the whole file if it runs once, when it is imported."""
        lines = self._lines(str(path))
        statement = range(mutant.first, mutant.last + 1) if mutant.function else [0]
        return set().union(*(lines.get(line, set()) for line in statement))

    def quickest(self, tests: Iterable[str], seconds: float) -> list[str]:
        """The quickest of some tests, at least one, that together take some seconds. The quickest files come first."""
        left, chosen = seconds, dict[str, list[str]]()
        for test in sorted(tests, key=lambda test: (self.cost(test), test)):
            spent = self.cost(test) - (self._start[_file(test)] if _file(test) in chosen else 0.0)
            if spent <= left or not chosen:
                left -= spent
                chosen.setdefault(_file(test), []).append(test)
        return [test for tests in chosen.values() for test in tests]

    def cost(self, test: str) -> float:
        """The seconds of a test that runs alone."""
        return self._start[_file(test)] + self._passed[test][1]

    def _lines(self, path: str) -> dict[int, set[str]]:
        if path not in self._contexts:
            found = self._data.contexts_by_lineno(path)
            self._contexts[path] = {line: set(contexts) & self._passed.keys() for line, contexts in found.items()}
            self._contexts[path][0] = set().union(*self._contexts[path].values())
        return self._contexts[path]


def _file(test: str) -> str:
    return test.partition("::")[0]


def settings_of_coverage(data: Path, sources: Iterable[Path]) -> str:
    """The settings of coverage that records contexts in this process, forks of it, and those that they start."""
    return (
        f"[run]\ndata_file={data}\nparallel=true\nsigterm=true\npatch=_exit,fork\nplugins=process_contexts\n"
        f"source={','.join(map(str, sources))}\n[process_contexts]\ncurrent={current_test(data)}\nmain={os.getpid()}\n"
    )


def current_test(data: Path) -> Path:
    """The file that has the ID of the test that runs."""
    return data.with_name("current")
