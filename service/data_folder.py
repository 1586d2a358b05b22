"""The data folder: locks it for one server, refuses foreign folders, and keeps the server's name."""

import contextlib
import fcntl
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..runtime.errors import InvalidRequest, reason_of
from .settings import SQLITE
from .synced_files import replace_file

OWNER, LOCK, FIRST_KEY = "owner", "lock", "first-key"
FIRST_START = {"files", LOCK, "owner.new", "work"}
"""What a first start may leave in the folder if it ends before it has written the server's name."""
BEFORE_START = {"lost+found", "tls"}
"""What may be in the folder before the first start: the file system's own folder, and certificates."""
_OWNER_NAME = re.compile(rb"[0-9a-f]{32}\s*")


@contextlib.contextmanager
def locked(data: Path) -> Iterator[bool]:
    """Locks the data folder for this process and makes it private. The lock ends with the process.

    Yields whether the folder was made for this. A new folder is removed if the block raises and it holds no file but
    the lock.

    Raises:
        InvalidRequest: the folder cannot be used, no server created it, or another server uses it.
    """
    if sys.platform == "win32":
        raise RuntimeError("the service needs Linux or macOS")
    file: IO[str]
    try:
        made = [folder for folder in (data, *data.parents) if not folder.exists()]
        data.mkdir(parents=True, exist_ok=True)
        if (foreign := _foreign_name(data)) is not None:
            remedy = "give a new or empty folder, or the folder of a server"
            raise InvalidRequest("data", f"{data} contains {foreign!r} and no server created it", remedy)
        with contextlib.suppress(PermissionError):  # the folder belongs to another user
            data.chmod(0o700)  # it holds requests, files and secrets
        file = (data / LOCK).open("w")
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else reason_of(error)
        raise InvalidRequest("data", f"{data} cannot be used ({reason})", "give a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # a start that was refused has removed it just now
                raise FileNotFoundError
        except OSError:
            reason = f"another server uses {data}"
            raise InvalidRequest("data", reason, "give another folder, or end that server") from None
        try:
            yield bool(made)
        except BaseException:
            _remove_unused(made)
            raise


def owner_name(data: Path) -> str:
    """Returns the name under which this folder's server claims requests. It is the same at every start."""
    path = data / OWNER
    name = path.read_text().strip() if path.exists() else ""
    if not name:
        name = uuid.uuid4().hex
        replace_file(path, name.encode(), 0o644)
    return name


def write_first_key(data: Path, key: str) -> Path:
    """Writes a key to a file that only its owner can read, and returns its path."""
    path = data / FIRST_KEY
    path.unlink(missing_ok=True)
    with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(f"{key}\n")
    return path


def remove_written(data: Path) -> None:
    """Removes the database, name, certificates and work folders of a start that nobody used."""
    for name in (SQLITE, f"{SQLITE}-wal", f"{SQLITE}-shm", OWNER):
        (data / name).unlink(missing_ok=True)
    for name in ("tls", "work", "tmp"):
        shutil.rmtree(data / name, ignore_errors=True)


def _remove_unused(made: list[Path]) -> None:
    """Removes the data folder and its parents, if they were made and have no file but the lock; the innermost first."""
    with contextlib.suppress(OSError):
        if made and all(path.is_dir() or path == made[0] / LOCK for path in made[0].rglob("*")):
            shutil.rmtree(made[0])
            for parent in made[1:]:
                parent.rmdir()


def _foreign_name(data: Path) -> str | None:
    """Returns a name in the folder that no server wrote, or None. A server would empty parts of such a folder."""
    names = {path.name for path in data.iterdir()}
    owner = data / OWNER  # exists even if the database is elsewhere
    if SQLITE in names or (owner.is_file() and _OWNER_NAME.fullmatch(owner.read_bytes()) is not None):
        return None
    allowed = BEFORE_START | (FIRST_START if LOCK in names else set())
    foreign = (name for name in names - allowed if not name.startswith(".") and not name.endswith(".log"))
    return min(foreign, default=None)
