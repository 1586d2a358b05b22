"""One stage in a process of its own, and the line of JSON that it ends in. Needs only the standard library."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .schedule import Stage

PROGRAM = Path(__file__).resolve().parent.parent / "lease.py"
POLL_SECONDS = 0.1
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
    """

    stage: str
    output: str
    graphs: str
    work: str
    dry_run: bool = False
    seconds: float = 0.0
    rows: str = ""
    module: str = ""

    @classmethod
    def read(cls, text: str) -> "Settings":
        """From the JSON of a command line."""
        return cls(**json.loads(text))

    @property
    def bundle(self) -> Path:
        """The bundle whose weights were generated here."""
        return Path(self.work) / "bundle"


def run_stage(settings: Settings, stage: Stage, seconds: float, stopped: Callable[[], str]) -> Line:
    """Runs a stage and returns its line. Kills it after `seconds`, or once `stopped` returns a reason."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        asked = {**asdict(settings), "seconds": seconds, "rows": str(rows), "module": stage.module}
        with (Path(settings.output) / "lease.log").open("a", encoding="utf-8") as log:
            print(f"== {stage.name}", file=log, flush=True)
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), "--run", json.dumps(asked)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while (code := process.poll()) is None and not stopped() and time.monotonic() < begin + seconds:
            time.sleep(POLL_SECONDS)
        _kill(process)
        state, reason = _state(code, stopped() or f"took longer than {seconds:.0f} s")
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").split("\n")[:-1]]
        if state in ("failed", "skipped"):
            said = found.pop()["reason"] if found and found[-1].keys() == {"reason"} else ""
            reason = said or f"{reason}: {_last_line(Path(settings.output) / 'lease.log', start)}"
    line: Line = {"stage": stage.name, "state": state, "seconds": round(time.monotonic() - begin, 2)}
    line |= {"reason": reason} if reason else {}
    return line | {"rows": found}


def not_started(stage: Stage, reason: str) -> Line:
    """The line of a stage that was not started."""
    return {"stage": stage.name, "state": "not started", "seconds": 0.0, "reason": reason, "rows": []}


def work(settings: Settings) -> int:
    """Runs a stage in this process; returns the exit code. The reason of a failure is its last row."""
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
