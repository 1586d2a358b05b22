"""Files that are what their records say, read through once and remembered."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from .manifest import FileRecord

Difference = Literal["is missing", "differs from its checksum", "cannot be read"]


def user_cache(folder: Path, part: str) -> Path:
    """Where the user's cache folder holds `part` of what is known of a folder."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return user_cache_path("sparsectrl-lcm") / part / name


def first_difference(folder: Path, records: Mapping[str, FileRecord]) -> tuple[str, Difference] | None:
    """The first file of `folder` that is not what its record says; None where all are.

    What was verified once is remembered in the user's cache folder with the file's size, times and inode, so that
    many gigabytes are read through once and not at every start.
    """
    memory = _Memory(folder)
    looks: dict[str, list[str | int]] = {}
    for name, record in records.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            return name, "is missing"
        if stat.st_size != record.bytes:
            return name, "differs from its checksum"
        looks[name] = [record.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    unknown = [name for name, look in looks.items() if memory.known.get(name) != look]
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for name, digest in zip(unknown, pool.map(lambda name: _digest(folder / name), unknown), strict=True):
            if digest is None:
                return name, "cannot be read"
            if digest != records[name].sha256:
                return name, "differs from its checksum"
    finally:
        pool.shutdown(cancel_futures=True)
    if unknown:
        memory.save(looks)
    return None


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str | None:
    """The checksum of a file; None where it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return None


class _Memory:
    """Which files of a folder were verified, with what they looked like before they were read."""

    def __init__(self, folder: Path) -> None:
        self._path = user_cache(folder, "verified").with_suffix(".json")
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, list[str | int]] = known if isinstance(known, dict) else {}

    def save(self, looks: dict[str, list[str | int]]) -> None:
        """Writes what the files looked like; without a cache they are read through again next time."""
        part = self._path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({**self.known, **looks}), encoding="utf-8")
            part.replace(self._path)
