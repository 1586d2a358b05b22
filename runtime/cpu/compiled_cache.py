"""Compiled graphs in the user's cache folder: a file for each graph, size and processor, all together up to a limit."""

import hashlib
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from platformdirs import user_cache_path

from ..operating_system import UNFINISHED, check_writable

MAX_BYTES = 8 * 1024**3
"""Limit on all files of a backend."""
MAX_SHARE = 0.1
"""Largest share of the disk's free space that a file takes."""
UNFINISHED_SECONDS = 3600.0
"""An unfinished file older than this was left behind by a process that died."""


def cache_folder(backend: str) -> Path | None:
    """The folder for the graphs that a backend compiles; None if the user's cache cannot be written.

    Bundles share it, so a copy of a bundle finds the graphs of the other.
    """
    folder = user_cache_path("sparsectrl-lcm") / backend
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError:
        return None
    return folder


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """A compiled graph on disk, after its own checksum: a library may crash on a damaged one.

    Attributes:
        folder: from `cache_folder`.
        key: a checksum of all that the compiled graph depends on.
    """

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / f"{self.key}.blob"

    def read(self) -> bytes | None:
        """The compiled graph; None if there is none, or if it is damaged."""
        try:
            content = self.path.read_bytes()
            os.utime(self.path)  # `trim` removes the least recently used
        except OSError:
            return None
        size = hashlib.sha256().digest_size
        return content[size:] if hashlib.sha256(content[size:]).digest() == content[:size] else None

    def write(self, blob: bytes) -> None:
        """Writes the compiled graph, unless the disk has little space left or cannot be written."""
        part = self.folder / f"{UNFINISHED}{token_hex(4)}"
        try:
            if len(blob) <= MAX_SHARE * shutil.disk_usage(self.folder).free:
                part.write_bytes(hashlib.sha256(blob).digest() + blob)
                part.replace(self.path)
        except OSError:
            with suppress(OSError):
                part.unlink()


def trim(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes the least recently used files until the rest take at most `max_bytes`, and what killed processes left."""
    for part in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if part.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                part.unlink()
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
