"""Measures the tests: changes one thing in the code at a time and reports which changes no test notices.

    python tests/mutation FOLDER record tests/runtime tests/engine    # which tests run which lines, once
    python tests/mutation FOLDER run --mutants 300 --seed 0           # continues where it stopped
    python tests/mutation FOLDER report

FOLDER gets a copy of the checkout, so that work in the checkout can go on. Each change runs in a fork of this process,
which has imported the libraries already.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import coverage
import psutil
import pytest
from mutants import Mutant, find_mutants

ROOT = Path(__file__).parents[2]
PARTS = ("runtime", "engine", "service")
LIBRARIES = (
    *("alembic", "av", "diffusers", "fastapi", "httpx", "hypothesis", "numpy", "onnx", "onnx_ir", "onnxruntime"),
    *("openvino", "peft", "PIL.Image", "rich", "sqlalchemy", "tokenizers", "torch", "transformers", "typer", "uvicorn"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("tests", nargs="+", help="folders or files of tests")
    run = commands.add_parser("run")
    run.add_argument("--parts", nargs="+", default=PARTS, help="folders of code")
    run.add_argument("--mutants", type=int, default=300)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--seconds", type=float, default=15.0, help="of the quickest tests of a line; more find more")
    for command in (record, run):
        command.add_argument("--minutes", type=float, default=1e6, help="stop after this time")
    commands.add_parser("report")
    options = parser.parse_args()
    work = Work(options.folder.resolve())
    if options.command != "report":
        end = time.monotonic() + options.minutes * 60
        work.enter()
        for _ in work.record(options.tests) if options.command == "record" else work.run(options):
            if time.monotonic() > end:
                break
    work.report()


class Work:
    """The files of a run: a copy of the checkout, which tests run which lines, and what became of each mutant."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.data = folder / "coverage"
        self.settings = folder / "coveragerc"
        self.tests = folder / "tests.jsonl"
        self.mutants = folder / "mutants.jsonl"
        self.output = folder / "output.txt"

    def enter(self) -> None:
        """Makes the copy, if there is none, and imports what all tests need."""
        if not self.tree.exists():
            listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
            for name in listed.stdout.splitlines():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
            (ROOT / ".cache").mkdir(exist_ok=True)
            (self.tree / ".cache").symlink_to((ROOT / ".cache").resolve())
        self.settings.write_text(
            f"[run]\ndata_file={self.data}\nparallel=true\nsigterm=true\n"
            f"source={','.join(str(self.tree / part) for part in PARTS)}\n"
            "context=${PYTEST_CURRENT_TEST-}\n"  # of a process: the test that started it
        )
        paths = [str(self.tree), str(self.tree / "tests")]
        sys.path[:0] = paths
        sys.dont_write_bytecode = True
        os.chdir(self.tree)
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant can have the size and second of the original
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        for library in LIBRARIES:
            importlib.import_module(library)
        conftest: Any = importlib.import_module("conftest")
        exports = conftest._cache()
        conftest._cache = lambda: exports  # a mutant must not export all checkpoints again

    def record(self, tests: list[str]) -> Iterator[str]:
        """Runs each file of tests that was not recorded yet."""
        done = {record["file"] for record in lines_of(self.tests)}
        for path in map(Path, tests):
            for file in sorted(map(str, path.rglob("test_*.py") if path.is_dir() else [path])):
                if file not in done:
                    in_fork(lambda name=file: self._record(name), 1500, self.output)  # type: ignore[misc]
                    yield file

    def _record(self, file: str) -> int:
        os.environ["COVERAGE_PROCESS_START"] = str(self.settings)
        measured = coverage.Coverage(config_file=str(self.settings))
        recorder = Recorder(measured)
        measured.start()
        code = pytest.main(["-q", "-p", "no:cacheprovider", file], [recorder])
        measured.stop()
        measured.save()
        append(self.tests, {"file": file, "tests": recorder.passed, "bad": sorted(recorder.bad)})
        return code

    def run(self, options: argparse.Namespace) -> Iterator[str]:
        """Runs the tests of each sampled mutant. Samples lines, and one mutant of each."""
        seconds = {test: spent for record in lines_of(self.tests) for test, spent in record["tests"].items()}
        covering = Covering(self.data, seconds)
        sources = {str(path): path.read_text() for part in options.parts for path in Path(part).rglob("*.py")}
        lines: dict[tuple[str, int], list[Mutant]] = {}
        for file, source in sources.items():
            for mutant in find_mutants(file, source):
                if covering.tests(self.tree / file, mutant):
                    lines.setdefault((file, mutant.line), []).append(mutant)
        done = {(record["file"], record["line"]) for record in lines_of(self.mutants)}
        for file, line in random.Random(options.seed).sample(sorted(lines), len(lines))[: options.mutants]:
            found = [mutant for mutant in lines[file, line] if mutant.compiles(sources[file])]
            if found and (file, line) not in done:
                mutant = random.Random(f"{options.seed} {file} {line}").choice(found)
                tests = sorted(covering.tests(self.tree / file, mutant), key=lambda test: seconds[test])
                yield self._run(mutant, sources[file], tests, seconds, options.seconds)

    def _run(self, mutant: Mutant, source: str, tests: list[str], seconds: dict[str, float], most: float) -> str:
        chosen = tests[:1]
        for test in tests[1:]:
            if sum(seconds[other] for other in [*chosen, test]) <= most:
                chosen.append(test)
        limit = 60 + 5 * sum(seconds[test] for test in chosen)
        began = time.monotonic()
        Path(mutant.file).write_text(mutant.apply(source))
        try:
            code = in_fork(lambda: pytest.main(["-xq", "-p", "no:cacheprovider", *chosen]), limit, self.output)
        finally:
            Path(mutant.file).write_text(source)
        result = {0: "survived", None: "out of time"}.get(code, "killed")
        figures = {"tests": len(chosen), "of": len(tests), "seconds": round(time.monotonic() - began, 1)}
        append(self.mutants, vars(mutant) | {"result": result} | figures)
        return result

    def report(self) -> None:
        """Prints the survivors and how many were killed."""
        records = lines_of(self.mutants)
        for record in records:
            if record["result"] != "killed":
                place, run = f"{record['file']}:{record['line']}", f"{record['tests']} of {record['of']} tests"
                print(f"{place}: {record['before']}  ->  {record['after']}  ({record['result']}, {run})")
        for part in PARTS:
            killed = [record["result"] != "survived" for record in records if record["file"].startswith(part)]
            print(f"{part}: {sum(killed)} of {len(killed)} killed")


class Recorder:
    """Sets the context of the coverage to each test, and keeps which tests passed, and their seconds."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured
        self._seconds: Counter[str] = Counter()
        self.bad: set[str] = set()

    @property
    def passed(self) -> dict[str, float]:
        return {test: round(spent, 2) for test, spent in self._seconds.items() if test not in self.bad}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self._measured.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if not report.passed:
            self.bad.add(report.nodeid)


class Covering:
    """Which tests run a line."""

    def __init__(self, data: Path, passed: dict[str, float]) -> None:
        combined = coverage.Coverage(data_file=str(data))
        combined.combine([str(data.parent)], keep=True)
        self._data = combined.get_data()
        self._passed = passed
        self._contexts: dict[str, dict[int, set[str]]] = {}

    def tests(self, path: Path, mutant: Mutant) -> set[str]:
        """The tests that run a mutant's statement; those of the whole file if it runs once, when it is imported."""
        lines = self._lines(str(path))
        statement = range(mutant.first, mutant.last + 1) if mutant.function else [0]
        return set().union(*(lines.get(line, set()) for line in statement))

    def _lines(self, path: str) -> dict[int, set[str]]:
        if path not in self._contexts:
            found = self._data.contexts_by_lineno(path)
            self._contexts[path] = {
                line: {context.partition(" (")[0] for context in contexts} & self._passed.keys()
                for line, contexts in found.items()
            }
            self._contexts[path][0] = set().union(*self._contexts[path].values())
        return self._contexts[path]


def in_fork(work: Callable[[], int], seconds: float, output: Path) -> int | None:
    """Returns the status of `work` in a fork of this process; None if it took longer and was ended."""
    child = os.fork()
    if child == 0:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            os._exit(work())
        finally:
            os._exit(99)
    end, process = time.monotonic() + seconds, psutil.Process(child)
    while not (status := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            for started in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    started.kill()
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(status[1])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
