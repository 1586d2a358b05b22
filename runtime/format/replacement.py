"""Replaces several files of a bundle as one: a process that is killed leaves all the old ones, or all the new ones.

The new files are written into a hidden folder of the bundle. Renaming that folder is the moment at which they count;
then they are moved into place, the manifest last. Whoever reads the bundle next finishes the moves of a process that
was killed in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

_DECIDED = ".replacement"
_LOCK = ".replacement.lock"


@contextmanager
def only_replacement(bundle: Path) -> Iterator[None]:
    """Makes other processes wait that want to replace files of a bundle.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = FileLock(bundle / _LOCK)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # while it is locked; Windows cannot
            Path(lock.lock_file).unlink()
        lock.release()


def replace_files(staged: Path, bundle: Path) -> None:
    """Moves the files of the folder `staged`, which lies in `bundle` and holds a new manifest, into their places."""
    finish_replacement(bundle)
    staged.rename(bundle / _DECIDED)
    finish_replacement(bundle)


def finish_replacement(bundle: Path) -> None:
    """Finishes the moves of a process that was killed. Several processes may do so at once."""
    decided = bundle / _DECIDED
    if not decided.is_dir():
        return
    manifest = decided / "manifest.json"
    files = [path for path in decided.rglob("*") if path.is_file() and path != manifest]
    for path in (*files, manifest):
        with suppress(FileNotFoundError):  # moved by another process
            path.replace(bundle / path.relative_to(decided))
    for folder in sorted((path for path in decided.rglob("*") if path.is_dir()), reverse=True):
        _remove_empty(folder)
    _remove_empty(decided)


def _remove_empty(folder: Path) -> None:
    """Removes a folder, unless files of the next replacement lie in it by now."""
    with suppress(OSError):
        folder.rmdir()
