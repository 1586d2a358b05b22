"""Measures the tests: changes one thing in the code at a time and reports which changes no test notices.

    python tests/mutation FOLDER record tests/runtime tests/engine    # which tests run which lines, once
    python tests/mutation FOLDER run --mutants 300 --seed 0           # continues where it stopped
    python tests/mutation FOLDER run --seconds 60                     # tries the survivors with more of their tests
    python tests/mutation FOLDER report

FOLDER gets a copy of the checkout, so that work in the checkout can go on. Each change runs in a fork of this process,
which has imported the libraries already.
"""

import argparse
import faulthandler
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest
from covering_tests import CoveringTests, Recorder, current_test, settings_of_coverage
from forks import adopt_orphans, in_fork
from mutants import Mutant, find_mutants

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
MUTANT_TIME = 2_000_000_000
"""When mutants seem to be written, in seconds."""
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
    run.add_argument("--parts", nargs="+", default=PARTS, help="folders or files of code")
    run.add_argument("--mutants", type=int, default=300)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--seconds", type=float, default=15.0, help="of the quickest tests of a line")
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
        adopt_orphans()
        paths = [str(self.tree), str(self.tree / "tests")]
        sys.path[:0] = paths
        os.chdir(self.tree)
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, str(HERE), os.environ.get("PYTHONPATH", "")])
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
            for file in sorted(map(str, python_files(path, "test_*.py"))):
                if file not in done:
                    in_fork(lambda name=file: self._record(name), 1500, self.output)  # type: ignore[misc]
                    yield file

    def _record(self, file: str) -> int:
        self.settings.write_text(settings_of_coverage(self.data, [self.tree / part for part in PARTS]))
        os.environ["COVERAGE_PROCESS_START"] = str(self.settings)
        measured = coverage.Coverage(config_file=str(self.settings))
        recorder = Recorder(measured, current_test(self.data))
        measured.start()
        code = pytest.main(["-q", "-p", "no:cacheprovider", file], [recorder])
        measured.stop()
        measured.save()
        append(self.tests, {"file": file, "tests": recorder.passed, "bad": sorted(recorder.bad)})
        return code

    def run(self, options: argparse.Namespace) -> Iterator[str]:
        """Runs the tests of each sampled mutant. Samples lines, and one mutant of each."""
        seconds = {test: tuple(spent) for record in lines_of(self.tests) for test, spent in record["tests"].items()}
        covering = CoveringTests(self.data, seconds)
        sources = {str(path): path.read_text() for part in options.parts for path in python_files(Path(part))}
        lines: dict[tuple[str, int], list[Mutant]] = {}
        for file, source in sources.items():
            for mutant in find_mutants(file, source):
                if covering.of(self.tree / file, mutant):
                    lines.setdefault((file, mutant.line), []).append(mutant)
        done = {
            place
            for place, last in self._results().items()
            if last["result"] == "killed" or last["tests"] == last["of"] or last.get("most", 0.0) >= options.seconds
        }
        for file, line in random.Random(options.seed).sample(sorted(lines), len(lines))[: options.mutants]:
            found = [mutant for mutant in lines[file, line] if mutant.compiles(sources[file])]
            if found and (file, line) not in done:
                mutant = random.Random(f"{options.seed} {file} {line}").choice(found)
                yield self._run(mutant, sources[file], covering, options.seconds)

    def _run(self, mutant: Mutant, source: str, covering: CoveringTests, most: float) -> str:
        covered = covering.of(self.tree / mutant.file, mutant)
        chosen = covering.quickest(covered, most)
        path, began = Path(mutant.file), time.monotonic()
        original = path.stat()
        path.write_text(mutant.apply(source))
        os.utime(path, (0, MUTANT_TIME + len(lines_of(self.mutants))))  # of its bytecode, which no other has
        try:
            limits = HangLimits(covering)
            code = in_fork(
                lambda: pytest.main(["-xq", "-p", "no:cacheprovider", *chosen], [limits]), 60 + 2 * most, self.output
            )
        finally:
            path.write_text(source)
            os.utime(path, ns=(original.st_atime_ns, original.st_mtime_ns))
        result = {0: "survived", None: "out of time"}.get(code, "killed")
        figures = {
            "tests": len(chosen),
            "of": len(covered),
            "most": most,
            "seconds": round(time.monotonic() - began, 1),
        }
        append(self.mutants, vars(mutant) | {"result": result, "code": code} | figures)
        return result

    def _results(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The last result of each line."""
        return {(record["file"], record["line"]): record for record in lines_of(self.mutants)}

    def report(self) -> None:
        """Prints the survivors and how many were killed."""
        records = self._results().values()
        for record in records:
            if record["result"] != "killed":
                place, run = f"{record['file']}:{record['line']}", f"{record['tests']} of {record['of']} tests"
                print(f"{place}: {record['before']}  ->  {record['after']}  ({record['result']}, {run})")
        for part in PARTS:
            killed = [record["result"] == "killed" for record in records if record["file"].startswith(part)]
            print(f"{part}: {sum(killed)} of {len(killed)} killed")


class HangLimits:
    """Ends the process if a test takes far longer than it did."""

    def __init__(self, covering: CoveringTests) -> None:
        self._covering = covering

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        faulthandler.dump_traceback_later(20 + 5 * self._covering.cost(item.nodeid), exit=True)


def python_files(path: Path, names: str = "*.py") -> Iterable[Path]:
    return path.rglob(names) if path.is_dir() else [path]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
