"""Bundles in a hub's cache, whose files are links to files outside the bundle's folder.

ONNX Runtime, OpenVINO and onnx-ir refuse weights that lie outside the folder of their graph. Such a bundle is used
through a folder of hard links, which takes no space.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from .checksums import user_cache
from .temporary_folders import clear_leftovers, staged_folder


def without_links(folder: Path) -> Path:
    """Returns the folder itself, or a folder in the user's cache with the same files if some are links out of it.

    Engines that are built later lie in that folder.

    Raises:
        OSError: the user's cache cannot be written.
    """
    if not os.path.isdir(folder):  # noqa: PTH112
        return folder  # unlike pathlib's, this test also takes names that are too long
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    root = folder.resolve()
    if all(path.resolve().is_relative_to(root) for path in links):
        return folder
    target = user_cache(root, "linked")
    if _is_current(folder, target):
        return target
    clear_leftovers(target.parent, target.name)
    with staged_folder(target.parent, target.name) as staged:
        for path in folder.rglob("*"):
            if path.is_file():
                copy = staged / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _link(path.resolve(), copy)
        shutil.rmtree(target, ignore_errors=True)
        with suppress(FileExistsError, OSError):  # another process was faster
            staged.replace(target)
    return target


def _is_current(folder: Path, target: Path) -> bool:
    """Whether `target` was made from these files."""
    try:
        return (target / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    except OSError:
        return False


def _link(source: Path, target: Path) -> None:
    """Makes a hard link, or a copy if the cache is on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
