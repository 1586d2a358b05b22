"""Hidden folders to write an output in, and what killed processes have left of theirs: gigabytes at full size."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def staged_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, named after `name` and this process; gone when the block ends.

    Raises:
        OSError: it cannot be made.
    """
    folder = parent / f".{name}-{os.getpid()}-{token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(parent: Path, name: str | None = None) -> None:
    """Removes the folders of processes that are gone, with `-old` behind them too.

    Args:
        parent: where they lie.
        name: what they were made for; None for anything.
    """
    wanted = ".+" if name is None else re.escape(name)
    for folder in parent.glob(".*"):
        process = re.fullmatch(rf"\.{wanted}-(\d{{1,9}})-[0-9a-f]{{8}}(-old)?", folder.name)
        if process is not None and not _is_alive(int(process[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
