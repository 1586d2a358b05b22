"""Verifies files against their checksums: reads each file once and remembers the result."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from .manifest import FileRecord

Difference = Literal["is missing", "differs from its checksum", "cannot be read"]


def user_cache(folder: Path, part: str) -> Path:
    """The place for data about `folder` in the user's cache; `part` names the kind of data, such as `engines`."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return user_cache_path("sparsectrl-lcm") / part / name


def clear_user_cache(folder: Path) -> None:
    """Removes everything about `folder` from the user's cache, because the folder was a temporary one."""
    for path in user_cache_path("sparsectrl-lcm").glob(f"*/{user_cache(folder, '').name}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def first_difference(folder: Path, records: Mapping[str, FileRecord]) -> tuple[str, Difference] | None:
    """The first file of `folder` that differs from its record, and how it differs; None if all files match.

    Verified files are remembered in the user's cache folder by size, times and inode. So many gigabytes are read once
    and not at every start.
    """
    verified = _VerifiedFiles(folder)
    stamps: dict[str, list[str | int]] = {}
    for name, record in records.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            return name, "is missing"
        if stat.st_size != record.bytes:
            return name, "differs from its checksum"
        stamps[name] = [record.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    unknown = [name for name, stamp in stamps.items() if verified.known.get(name) != stamp]
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
        verified.save(stamps)
    return None


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str | None:
    """The checksum of a file; None if it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return None


class _VerifiedFiles:
    """The verified files of a folder, each with its checksum, size, times and inode from before it was read."""

    def __init__(self, folder: Path) -> None:
        self._path = user_cache(folder, "verified").with_suffix(".json")
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, list[str | int]] = known if isinstance(known, dict) else {}

    def save(self, stamps: dict[str, list[str | int]]) -> None:
        """Writes the stamps of verified files. If the cache cannot be written, the files are read again next time."""
        part = self._path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({**self.known, **stamps}), encoding="utf-8")
            part.replace(self._path)
