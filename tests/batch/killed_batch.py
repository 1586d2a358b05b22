"""Runs `batch` with a quick pipeline, and kills itself with -9: PLACE NUMBER ARGUMENTS...

PLACE is where it happens, at the clip of this NUMBER: `probing` while its folder is checked, `encoding` with half of
its file written, `renamed` when it has its name and no result yet, `result` with half of its result written, or
`never`. `waiting` prints this and waits for a signal instead. Seeds that run go to `ran.log`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fakes.quick_executor import quick_pipeline
from sparsectrl_lcm.batch.results_file import ResultsFile
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.output import writers

from sparsectrl_lcm import cli

place, number = sys.argv[1], int(sys.argv[2])
encoded, added = [], []
write_gif, add, check_writable = writers._WRITERS[".gif"], ResultsFile.add, writers.check_writable
log = os.open("ran.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_write(clip: Any, path: Path, fps: float, text: str | None) -> None:
    write_gif(clip, path, fps, text)
    encoded.append(path)
    if place == "encoding" and len(encoded) == number:
        os.truncate(path, path.stat().st_size // 2)
        kill()


def killed_add(self: Any, record: dict[str, Any]) -> None:
    added.append(record)
    if len(added) == number and place == "waiting":
        print("waiting", flush=True)
        time.sleep(60)
    if len(added) == number and place in ("renamed", "result"):
        if place == "result":
            self._file.write(json.dumps(record).encode()[:40])
            self._file.flush()
        kill()
    add(self, record)


def killed_check(folder: Path) -> None:
    if place == "probing" and len(added) == number - 1:
        Path.unlink = lambda *_, **__: kill()  # type: ignore[method-assign, assignment]
    check_writable(folder)


def note(request: CheckedRequest) -> None:
    os.write(log, f"{request.seed}\n".encode())


writers._WRITERS[".gif"] = killed_write
writers.check_writable = killed_check
ResultsFile.add = killed_add  # type: ignore[method-assign]
VideoPipeline.load = lambda *_, **__: quick_pipeline(note)  # type: ignore[method-assign, assignment, misc]
sys.exit(cli.run(["batch", *sys.argv[3:]]))
