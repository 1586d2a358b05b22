"""Spends the minutes of a rented GPU: stage after stage, the most useful first, each with a line of JSON.

    python benchmarks/lease_prepare.py                          before: packages and graphs, into .cache/lease
    python benchmarks/lease.py --budget 840 --output DIR        on the machine with the GPU
    python benchmarks/lease_report.py DIR/lease.jsonl           after: results, table and picture

Runs from the source tree on a machine with torch. Each stage is a process of its own with a deadline. A stage that
fails or is killed still ends in a line, with what it had measured, and the next stage runs. If the budget ends or this
program is stopped, the stages that were not started get their lines, too. If this program is killed, the running stage
ends with it, and the report reads what it had measured from DIR/STAGE.rows. The stages' output is in DIR/lease.log.

The exit code is 0 if the decisive stages were done, 1 if not, 2 if a file cannot be read or written or packages are
missing, 130 if this program was stopped.

This program itself needs nothing but Python's standard library.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).parent))

from lease_stages.lines import Unusable, ends_within_a_line, errors_in_a_line
from lease_stages.processes import Line, Settings, not_started, rows_file, run_stage, unfinished, work
from lease_stages.schedule import NEEDED, STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / ".cache" / "lease"
"""What `lease_prepare.py` writes: an archive of packages for a version of Python, and the folder `graphs`."""
ARCHIVE = "packages-{}.zip"
MARKER = "made-by-lease.py"
"""A file in the folder of unpacked packages. `lease.py` removes nothing from a folder without it."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=seconds, default=840.0, help="seconds for everything; default: 840")
    parser.add_argument("--output", type=Path, help="folder for lease.jsonl and lease.log")
    packages = PREPARED / ARCHIVE.format(f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--packages", type=Path, default=packages, help="packages that Python lacks here")
    parser.add_argument("--graphs", type=Path, default=PREPARED / "graphs", help="a full-size bundle without weights")
    parser.add_argument("--work", type=Path, help="folder for the weights, 8 GB; default: in the temporary folder")
    parser.add_argument(
        "--stages", default=",".join(stage.name for stage in STAGES), help="default: all, in this order"
    )
    parser.add_argument("--allow-missing", action="store_true", help="run even if packages are missing")
    parser.add_argument("--dry-run", action="store_true", help="test run on the CPU with the demo bundle")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.stages.split(",")) - {stage.name for stage in STAGES}:
        parser.error(f"--stages: {sorted(unknown)[0]!r} is unknown")
    if options.output is None and options.run is None:
        parser.error("--output: name a folder")
    return options


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def main() -> None:
    """Runs the stages."""
    options = arguments()
    if options.run:
        sys.exit(work(Settings.read(options.run)))
    with errors_in_a_line(), stop_signals() as stopped:
        sys.exit(run(options, stopped))


def run(options: argparse.Namespace, stopped: Callable[[], str]) -> int:
    """Runs the stages and prints a line for each; returns the exit code."""
    working = (options.work or Path(tempfile.gettempdir()) / "sparsectrl-lcm-lease").resolve()
    folders = search_path(unpacked(options.packages, working / "sparsectrl-lcm-packages"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*folders, os.getenv("PYTHONPATH")]))
    sys.path[:0] = folders
    if options.dry_run:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # its tensors are small: threads would wait for each other
    if (missing := missing_packages()) and not options.allow_missing:
        print(f"missing: {' '.join(missing)}; run before: python benchmarks/lease_prepare.py", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if stage.name in options.stages.split(",")]
    settings = Settings(
        stage="",
        output=str(options.output.resolve()),
        graphs=str(options.graphs.resolve()),
        work=str(working),
        dry_run=options.dry_run,
    )
    undecided = False
    for stage, line in zip(stages, run_stages(stages, settings, options.budget, stopped), strict=True):
        undecided |= bool(stage.decisive) and line["state"] != "done"
        print(summary(line), flush=True)
    if stopped():
        return 130
    return 1 if undecided else 0


def unpacked(packages: Path, folder: Path) -> Path:
    """The folder of the packages; those of an archive are unpacked into a new folder in `folder`.

    Raises:
        Unusable: the archive is damaged, or `folder` holds something else; nothing was removed.
    """
    if not packages.is_file():
        return packages
    target = folder / "unpacked"
    with opened(packages) as archive:
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            raise Unusable(f"{folder}: was not made by lease.py; remove it or name another folder with --work")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        shutil.rmtree(target, ignore_errors=True)
        archive.extractall(target)
    return target


def opened(path: Path) -> zipfile.ZipFile:
    """An archive, every file of which can be read."""
    try:
        archive = zipfile.ZipFile(path)
        damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted or unknown
        raise Unusable(f"{path}: {error}") from None
    if damaged:
        raise Unusable(f"{path}: {damaged} is damaged")
    return archive


def search_path(packages: Path) -> list[str]:
    """The folders that Python searches besides its own."""
    return [
        str(folder.resolve()) for folder in (ROOT, ROOT / "benchmarks", ROOT / "tests", packages) if folder.exists()
    ]


def missing_packages() -> list[str]:
    """The packages that neither Python nor the folder of packages has."""

    def found(module: str) -> bool:
        with suppress(ModuleNotFoundError):
            return find_spec(module) is not None
        return False

    return sorted(package for package, module in NEEDED.items() if not found(module))


def run_stages(
    stages: Sequence[Stage], settings: Settings, budget: float, stopped: Callable[[], str] = lambda: ""
) -> Iterator[Line]:
    """Runs the stages within `budget` seconds. Writes a line for each to lease.jsonl and returns it.

    Args:
        stages: in their order.
        settings: of all stages.
        budget: in seconds.
        stopped: returns a reason to stop, or "".

    Raises:
        OSError: a file cannot be written. The rows of the running stage are kept.
    """
    end, reason = time.monotonic() + budget, ""
    path = Path(settings.output) / "lease.jsonl"
    with path.open("a", encoding="utf-8") as file:
        if ends_within_a_line(path):
            file.write("\n")
        for line in unfinished(Path(settings.output)):
            append(file, line)
            rows_file(settings.output, line["stage"]).unlink()
        for stage in stages:
            left = end - time.monotonic()
            reason = reason or stopped() or ("" if left > 0 else f"the budget of {budget:g} s was spent")
            if reason:
                line = not_started(stage, reason)
            else:
                line = run_stage(replace(settings, stage=stage.name), stage, min(stage.seconds, left), stopped)
                if stage.decisive and not any(stage.decisive in row for row in line["rows"]):
                    reason = f"{stage.name}: {line.get('reason', 'found nothing')}"
            append(file, line)
            rows_file(settings.output, stage.name).unlink(missing_ok=True)
            yield line


def append(file: TextIO, line: Line) -> None:
    """Writes a line so that it outlives this program and the machine."""
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def stop_signals() -> Iterator[Callable[[], str]]:
    """Keeps signals from ending the program at once. Gives a function that returns which one came, "" before."""
    came: list[str] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {each: signal.signal(each, lambda number, _: came.append(signal.Signals(number).name)) for each in signals}
    try:
        yield lambda: f"stopped by {came[0]}" if came else ""
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def summary(line: Line) -> str:
    """A line for people."""
    return " | ".join(
        [f"{line['stage']:20}", f"{line['state']:11}", f"{line['seconds']:6.1f} s", line.get("reason", "")]
    )


if __name__ == "__main__":
    main()
