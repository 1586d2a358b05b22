"""A real PostgreSQL server for tests, which listens on a socket in its own folder."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from fakes.missing_programs import missing


def programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    named = shutil.which("initdb")
    return found[-1].parent if found else Path(named).parent if named else None


def postgresql(folder: Path) -> Iterator[str]:
    """Starts a server in `folder`, yields the URL of an empty database, and stops the server."""
    if programs() is None:
        missing("postgresql")
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    _run(folder, "initdb", "-A", "trust", "-U", "test")
    start(folder)
    try:
        yield f"postgresql://test@/postgres?host={folder}"
    finally:
        stop(folder)


def folder_of(url: str) -> Path:
    """The folder of the server that a URL of `postgresql` leads to."""
    return Path(url.partition("host=")[2])


def start(folder: Path) -> None:
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    _run(folder, "pg_ctl", "-w", "-l", folder / "log", "-o", options, "start")


def stop(folder: Path, mode: str = "immediate") -> None:
    """Stops a server: `immediate` as a crash would, `fast` in order."""
    _run(folder, "pg_ctl", "-w", "-m", mode, "stop")


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Stops the processes of a server for the block. Its connections stay open and silent."""
    main = psutil.Process(int((folder / "data/postmaster.pid").read_text().split()[0]))
    main.send_signal(signal.SIGSTOP)  # first, so that it starts no other process
    processes = [main, *main.children(recursive=True)]
    for process in processes[1:]:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _run(folder: Path, program: str, *arguments: Any) -> None:
    tools = programs()
    assert tools is not None
    as_other = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]  # it refuses to run as root
    command = [*(as_other if os.getuid() == 0 else []), tools / program, "-D", folder / "data", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
