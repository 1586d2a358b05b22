"""The results of a batch: a line of JSON for each clip or error, in `results.jsonl` beside the clips."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..runtime.errors import OutputError
from ..runtime.format.temporary_folders import created_folder
from ..runtime.operating_system import UNFINISHED
from ..runtime.output.writers import remove_parts

NAME = "results.jsonl"
_LOCK = ".lock"
_OF_CLIPS = ("id", "file", "digest", "sha256")
"""Fields of a clip's line that `--resume` reads."""


@contextmanager
def open_results(folder: Path, *, resume: bool) -> Iterator["ResultsFile"]:
    """Opens the results in the folder of the clips, which is created if missing. Only one process at a time can do so.

    What it created is removed again if the block fails before it has a clip or a result.

    Args:
        folder: of the clips.
        resume: whether there may be results already.

    Raises:
        OutputError: there are results and `resume` is false, the folder holds files that no batch wrote, another
            process writes them, or a line is no result.
        OSError: the folder cannot be read or written.
    """
    with created_folder(folder), _results_in(folder, resume=resume) as results:
        yield results


@contextmanager
def _results_in(folder: Path, *, resume: bool) -> Iterator["ResultsFile"]:
    path, lock = folder / NAME, FileLock(folder / _LOCK)
    new = [file for file in (path, folder / _LOCK) if not file.exists()]
    if not path.exists() and _has_other_files(folder):  # every batch creates its results before a clip
        raise OutputError("output", f"the folder {str(folder)!r} is not empty", "name a new one")
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
    except Timeout:
        raise OutputError("output", f"another batch is writing to {str(folder)!r}") from None
    try:
        remedy = "give --resume to go on, or name another folder"
        if not resume and path.exists() and path.stat().st_size:
            raise OutputError("output", f"{str(path)!r} exists", remedy)
        if not resume and _has_other_files(folder):
            raise OutputError("output", f"the folder {str(folder)!r} is not empty", remedy)
        remove_parts(folder)
        with path.open("ab+") as file:
            yield ResultsFile(folder, file)
    except BaseException:
        if not (_has_other_files(folder) or (path.exists() and path.stat().st_size)):
            for created in new:
                with suppress(OSError):
                    created.unlink()
        raise
    finally:
        lock.release()


def _has_other_files(folder: Path) -> bool:
    """Whether a folder holds more than a batch without a clip leaves."""
    names = (path.name for path in folder.iterdir())
    return any(name not in (NAME, _LOCK) and not name.startswith(UNFINISHED) for name in names)


class ResultsFile:
    """The lines of `results.jsonl`. The last clip of an ID counts, also if an error of the same ID follows.

    A line is appended after its clip has its name, so every line tells of a whole clip.
    """

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self._folder = folder
        self._file = file
        self._clips = {record["id"]: record for record in self._read() if record["status"] == "done"}

    def has(self, job_id: str, digest: str) -> bool:
        """Whether the clip of this ID was made from what `digest` stands for, and its file is whole."""
        record = self._clips.get(job_id)
        if record is None or record["digest"] != digest:
            return False
        with suppress(OSError):
            return checksum(self._folder / record["file"]) == str(record["sha256"])
        return False

    def add(self, record: dict[str, Any]) -> None:
        """Appends a line, which has an `id` and a `status`."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if record["status"] == "done":
            self._clips[record["id"]] = record

    def _read(self) -> list[dict[str, Any]]:
        """The lines. Cuts off the last one if its process was killed while it wrote."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        records = []
        for number, text in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(text)
                needed = _OF_CLIPS if record["status"] == "done" else ("id",)
                if not all(isinstance(record[name], str) for name in needed):
                    raise TypeError
                records.append(record)
            except (ValueError, TypeError, KeyError, RecursionError):
                where = f"line {number} of {str(self._folder / NAME)!r}"
                raise OutputError("output", f"{where} is not a result", "remove it, or name another folder") from None
        return records


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
