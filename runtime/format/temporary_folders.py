"""Hidden folders for unfinished output, and the removal of those that failures and killed processes left behind.

At full size such a folder holds gigabytes. While a process writes to one, it locks a file beside it. A folder whose
lock is free was left behind. The lock file is outside the folder because Windows cannot rename a folder that has an
open file in it.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

_LOCK = ".lock"
_LOCK_ATTEMPTS = 3
_INSIDE = "new"
"""Name of the temporary folder for the content of a folder that exists: it lies inside."""

Keep = Callable[[Path], bool]
"""Whether the content of a folder is worth keeping."""


def keep_nothing(_: Path) -> bool:
    """Keeps no folder."""
    return False


@contextmanager
def created_folder(folder: Path) -> Iterator[None]:
    """Creates a folder and its parents for a block. Those that were missing and are empty at its end are removed.

    Raises:
        OSError: it cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def staged_folder(parent: Path, name: str, keep: Keep = keep_nothing) -> Iterator[Path]:
    """A new folder in `parent`, named after `name`.

    It is removed when the block ends, unless `keep` is true for it then: such a folder becomes a leftover. So is
    `parent` if it was missing and nothing else was put there.

    Raises:
        OSError: the folder cannot be created.
    """
    with created_folder(parent):
        folder, lock = _locked_folder(parent, name)
        try:
            yield folder
        finally:
            if not keep(folder):
                shutil.rmtree(folder, ignore_errors=True)
            _release(lock)


def leftovers(parent: Path, name: str | None = None) -> Iterator[Path]:
    """The folders in `parent` that no process writes to any more, each locked while the caller has it.

    A folder may be gone while its lock or its `-old` folder is left. On a file system that is read-only or has no
    locks, there are none.

    Args:
        parent: the folder that holds them.
        name: the name that they were created with; None for all names.
    """
    wanted = r".+-\d+-\w{8}" if name is None else rf"{re.escape(name)}-\d+-[0-9a-f]{{8}}"
    found = (re.fullmatch(rf"(\.{wanted})(-old|{re.escape(_LOCK)})?", path.name) for path in parent.glob(".*"))
    for folder in sorted({parent / match[1] for match in found if match}):
        lock = _lock_of(folder)
        try:
            lock.acquire(timeout=0)
        except (OSError, NotImplementedError):  # mostly Timeout, an OSError: a process writes to it
            continue
        try:
            yield folder
        finally:
            _release(lock)


def clear_leftovers(parent: Path, name: str | None = None, keep: Keep = keep_nothing) -> None:
    """Removes the `leftovers` in `parent`, and their `-old` folders, except those for which `keep` is true."""
    for folder in leftovers(parent, name):
        if not keep(folder):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name(f"{folder.name}-old"), ignore_errors=True)


def is_vacant(folder: Path) -> bool:
    """Whether a folder is missing, or is empty once what killed processes left in it is removed.

    Raises:
        OSError: it cannot be read.
    """
    clear_leftovers(folder, _INSIDE)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose content is moved to a vacant `folder` if the block succeeds.

    An empty folder is filled, not replaced: it may be a mount or the working directory of a shell. `manifest.json`
    is moved last, since a folder that has one is a whole bundle.

    Raises:
        OSError: a folder cannot be written.
    """
    folder = folder.absolute()
    exists = folder.is_dir()
    clear_leftovers(folder.parent, folder.name)
    with staged_folder(*((folder, _INSIDE) if exists else (folder.parent, folder.name))) as staged:
        yield staged
        if exists:
            for path in sorted(staged.iterdir(), key=lambda path: path.name == "manifest.json"):
                path.rename(folder / path.name)
        else:
            staged.rename(folder)


def _locked_folder(parent: Path, name: str) -> tuple[Path, FileLock]:
    """A new folder, and the lock that marks it as in use."""
    for attempt in range(_LOCK_ATTEMPTS):
        folder = parent / f".{name}-{os.getpid()}-{token_hex(4)}"
        lock = _lock_of(folder)
        last = attempt == _LOCK_ATTEMPTS - 1
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not last:  # another process removes the new lock file as a leftover, or locks never succeed here
                with suppress(OSError):
                    Path(lock.lock_file).unlink()
                continue
        except (OSError, NotImplementedError):
            last = True  # no locks here: the folder stays if its process is killed
        if last or Path(lock.lock_file).exists():  # else a process removed it as a leftover before it was locked
            break
        lock.release()
    try:
        folder.mkdir()
    except OSError:
        _release(lock)
        raise
    return folder, lock


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}{_LOCK}"))


def _release(lock: FileLock) -> None:
    """Releases a lock and removes its file."""
    file = Path(lock.lock_file)
    with suppress(OSError):
        file.unlink()  # while it is locked, so that no process locks a file that is being removed
    lock.release()
    with suppress(OSError):
        file.unlink()  # Windows cannot remove an open file
