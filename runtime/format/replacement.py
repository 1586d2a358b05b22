"""Replaces several files of a bundle as one: a process that is killed leaves all the old ones, or all the new ones.

The new files are written into a hidden folder of the bundle. Renaming that folder is the moment at which they count;
then they are moved into place, the manifest last. Whoever reads the bundle next finishes the moves of a process that
was killed in between.
"""

import shutil
from contextlib import suppress
from pathlib import Path

_DECIDED = ".replacement"


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
    shutil.rmtree(decided, ignore_errors=True)
