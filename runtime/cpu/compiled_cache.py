"""Compiled graphs in the user's cache folder, one file for each graph and size, up to a limit."""

from contextlib import suppress
from pathlib import Path

from ..format.checksums import user_cache
from ..operating_system import check_writable

MAX_BYTES = 8 * 1024**3
"""Limit on the files of one bundle."""


def cache_folder(bundle: Path, backend: str) -> Path | None:
    """The folder for the graphs that a backend compiles for a bundle; None if the user's cache cannot be written."""
    folder = user_cache(bundle, backend)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError:
        return None
    return folder


def trim(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes the least recently used files until the rest take at most `max_bytes`."""
    stats = []
    for path in folder.glob("*.blob"):
        with suppress(OSError):  # another process may trim at the same time
            stats.append((path, path.stat()))
    stats.sort(key=lambda item: max(item[1].st_atime_ns, item[1].st_mtime_ns), reverse=True)
    total = 0
    for path, stat in stats:
        total += stat.st_size
        if total > max_bytes:
            with suppress(OSError):
                path.unlink()
