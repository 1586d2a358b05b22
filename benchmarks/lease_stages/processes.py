"""One stage in a process of its own, and the line of JSON that it ends in. Needs only the standard library."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .lines import read_objects
from .schedule import Stage

PROGRAM = Path(__file__).resolve().parent.parent / "lease.py"
POLL_SECONDS = 0.1
ROWS = ".rows"
SKIPPED = 3
"""The exit code of a stage that cannot run on this machine."""

Row = dict[str, Any]
Line = dict[str, Any]
Write = Callable[[Row], None]
"""Writes what a stage has measured so far; it is kept if the stage is killed later."""


class CannotRun(Exception):
    """This machine lacks what a stage needs. The message says what."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a stage has to know.

    Attributes:
        stage: its name.
        output: the folder of the lines and the log.
        graphs: the full-size bundle without weights.
        work: the folder for the weights.
        dry_run: whether it runs on the CPU, with the demo bundle.
        seconds: its deadline, from its start.
        rows: the file for its rows.
        module: its module.
        ends_with_parent: whether it ends if the process that started it dies.
        began: when it was started, in seconds since the epoch.
    """

    stage: str
    output: str
    graphs: str
    work: str
    dry_run: bool = False
    seconds: float = 0.0
    rows: str = ""
    module: str = ""
    ends_with_parent: bool = False
    began: float = 0.0

    @classmethod
    def read(cls, text: str) -> "Settings":
        """From the JSON of a command line."""
        return cls(**json.loads(text))

    @property
    def bundle(self) -> Path:
        """The bundle whose weights were generated here."""
        return Path(self.work) / "bundle"

    @property
    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.began + self.seconds - time.time()

    def deadline(self, share: float) -> float:
        """When a share of the stage's time will have passed since its start, as a time of `time.perf_counter`."""
        return time.perf_counter() + self.left - (1 - share) * self.seconds


def run_stage(settings: Settings, stage: Stage, seconds: float, stopped: Callable[[], str]) -> Line:
    """Runs a stage and returns its line. Kills it after `seconds`, or once `stopped` returns a reason."""
    begin, rows = time.monotonic(), rows_file(settings.output, stage.name)
    given = {"seconds": seconds, "rows": str(rows), "module": stage.module, "began": time.time()}
    rows.write_text(json.dumps({"began": given["began"]}) + "\n", encoding="utf-8")
    with (Path(settings.output) / "lease.log").open("a", encoding="utf-8") as log:
        print(f"== {stage.name}", file=log, flush=True)
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--run", json.dumps(asdict(settings) | given | {"ends_with_parent": True})],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while (code := process.poll()) is None and not stopped() and time.monotonic() < begin + seconds:
        time.sleep(POLL_SECONDS)
    _kill(process)
    state, reason = _state(code, stopped() or f"took longer than {seconds:.0f} s")
    _, *found = _rows_of(rows)
    if state in ("failed", "skipped"):
        said = found.pop()["reason"] if found and found[-1].keys() == {"reason"} else ""
        reason = said or f"{reason}: {_last_line(Path(settings.output) / 'lease.log', start)}"
    line: Line = {"stage": stage.name, "state": state, "seconds": round(time.monotonic() - begin, 2)}
    line |= {"reason": reason} if reason else {}
    return line | {"rows": found}


def rows_file(output: str, stage: str) -> Path:
    """The file for the rows of a running stage: when it began, then a row a line."""
    return Path(output) / f"{stage}{ROWS}"


def unfinished(output: Path) -> Iterator[Line]:
    """A line for each stage whose line lease.py could not write, killed or on a full disk, with the stage's rows."""
    for path in sorted(output.glob(f"*{ROWS}")):
        rows, seconds = _rows_of(path), 0.0
        if rows:
            seconds = max(0.0, round(path.stat().st_mtime - rows[0]["began"], 2))
        reason = "lease.py ended without writing this line"
        yield {"stage": path.stem, "state": "killed", "seconds": seconds, "reason": reason, "rows": rows[1:]}


def not_started(stage: Stage, reason: str) -> Line:
    """The line of a stage that was not started."""
    return {"stage": stage.name, "state": "not started", "seconds": 0.0, "reason": reason, "rows": []}


def work(settings: Settings) -> int:
    """Runs a stage in this process; returns the exit code. The reason of a failure is its last row."""
    if settings.ends_with_parent:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with Path(settings.rows).open("a", encoding="utf-8", buffering=1) as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")

        try:
            import_module(settings.module).measure(settings, write)
        except CannotRun as error:
            write({"reason": str(error)})
            return SKIPPED
        except Exception as error:
            import traceback

            traceback.print_exc()
            lines = str(error).strip().splitlines()
            write({"reason": f"{type(error).__name__}: {lines[0] if lines else ''}"})
            return 1
    return 0


def _end_with(parent: int) -> None:
    """Kills this stage and the processes that it started once the process that started it has died.

    Windows gives the number of the parent even after its death, so there the stage goes on.
    """
    if sys.platform != "win32":
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)


def _rows_of(path: Path) -> list[Row]:
    """The rows of a file, without those that were cut off."""
    return read_objects(path)[0]


def _state(code: int | None, overdue: str) -> tuple[str, str]:
    """The state of a stage and the reason, from its exit code; None if it had not ended."""
    if code is None:
        return "killed", overdue
    if code < 0:
        return "killed", f"ended by {signal.Signals(-code).name}"
    states = {0: ("done", ""), SKIPPED: ("skipped", "cannot run here")}
    return states.get(code, ("failed", f"ended with code {code}"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a stage and the processes that it started, even after it has ended itself."""
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(OSError):
        process.kill()
    process.wait()


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
