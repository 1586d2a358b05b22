"""A real PostgreSQL server for tests, which listens on a socket in its own folder."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fakes.missing_programs import missing


def programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    named = shutil.which("initdb")
    return found[-1].parent if found else Path(named).parent if named else None


def postgresql(folder: Path) -> Iterator[str]:
    """Starts a server in `folder`, yields the URL of an empty database, and stops the server."""
    tools = programs()
    if tools is None:
        missing("postgresql")
    data, prefix = folder / "data", []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    subprocess.run(
        [*prefix, tools / "initdb", "-D", data, "-A", "trust", "-U", "test"], check=True, capture_output=True
    )
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    control = [*prefix, tools / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql://test@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)
