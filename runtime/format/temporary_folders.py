"""Hidden folders to write an output in, and what killed processes have left of theirs: gigabytes at full size.

A folder is locked as long as its process writes in it, so that what is not locked was left.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex


@contextmanager
def staged_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, named after `name`; gone when the block ends.

    Raises:
        OSError: it cannot be made.
    """
    folder, descriptor = _locked_folder(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def clear_leftovers(parent: Path, name: str | None = None) -> None:
    """Removes the folders that nobody writes in any more, with `-old` behind them too.

    Args:
        parent: where they lie.
        name: what they were made for; None for anything.
    """
    wanted = r".+-\d+-\w{8}(-old)?" if name is None else rf"{re.escape(name)}-\d+-[0-9a-f]{{8}}"
    for folder in parent.glob(".*"):
        if re.fullmatch(rf"\.{wanted}", folder.name):
            with suppress(OSError):  # where it is locked, foremost
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    """A new folder, and what keeps it locked until it is closed."""
    while True:
        folder = parent / f".{name}-{os.getpid()}-{token_hex(4)}"
        folder.mkdir(parents=True)
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # file systems without locks keep what is left
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():  # else it was taken for a leftover before it was locked
            return folder, descriptor
        os.close(descriptor)
