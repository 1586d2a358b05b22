"""Uploads in parts. All their state is in token, store and object store, so that any machine can take any part."""

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from .. import clock
from ..auth.upload_tokens import Upload
from ..components import Service
from ..protocol.errors import ServiceError, infrastructure_error, quota_error
from ..settings import DAY
from ..store import FileRow, QuotaExceeded
from .disk_space import disk_full_is_507
from .file_metadata import OCTETS
from .object_stores import Files
from .stored_files import keep_upload

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_PARTS = 1000
LIST_BYTES = 2**20
"""Largest list of parts."""


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    object_name: str
    digest: str


def part_number(text: str) -> int:
    """Returns the number of a part.

    Raises:
        ServiceError: 400 if it is not one.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_PARTS):
        raise infrastructure_error("bad_request", f"Parts have numbers from 1 to {MAX_PARTS}")
    return int(text)


def keep_part(service: Service, upload: Upload, number: int, source: Path, size: int, digest: str) -> None:
    """Stores a part and replaces an earlier part of the same number. Blocks.

    Args:
        service: whose stores are used.
        upload: the upload that the part belongs to.
        number: the part's number, from 1 on.
        source: file with its bytes.
        size: number of bytes.
        digest: their SHA-256 in hex, which is the part's ETag.

    Raises:
        ServiceError: 413 if the parts together are too large, 507 if the disk is full or the key has no bytes left.
    """
    now, limit = clock.now(), service.settings.upload_bytes
    name = f"parts/{upload.file_id}-{number}"
    # a part has a file's record, so that it expires like one; an id with a dot has no URL
    row = FileRow(_part_id(upload, number), upload.key_id, digest, OCTETS, size, name, now, now + DAY)
    every = [_part_id(upload, one) for one in range(1, MAX_PARTS + 1)]
    try:  # before the bytes, so that a crash leaves none without a record
        fits = service.store.add_part(row, every, limit, service.settings.key_bytes)
    except QuotaExceeded as error:
        raise quota_error(error) from None
    if not fits:
        raise ServiceError(413, f"The file is too large; allowed are {limit} bytes", "file_too_large")
    with disk_full_is_507():
        service.files.put(name, source)


def complete(service: Service, upload: Upload, listed: Sequence[tuple[int, str]]) -> FileRow:
    """Joins parts in the order of their numbers. Blocks. A repeated call has no further effect.

    Args:
        service: whose stores are used.
        upload: the upload.
        listed: number and ETag of every part, as `listed_parts` returns them.

    Raises:
        ServiceError: 400 if a part is missing, or differs from the one that the client lists.
    """
    if (done := _done(service, upload)) is not None:
        return done
    rows = [(service.store.get_file(_part_id(upload, number)), number, etag) for number, etag in listed]
    parts = []
    for row, number, etag in rows:
        if row is None or row.key_id != upload.key_id:
            # a client that got no answer may call again while its first call is about to succeed
            if (done := _done(service, upload)) is not None:
                return done
            raise infrastructure_error("bad_request", f"Part {number} was not uploaded")
        if row.name != etag:
            raise infrastructure_error("bad_request", f"Part {number} has another etag than the one given")
        parts.append(_Part(number, row.object_name, row.name))
    found = [row for row, *_ in rows if row is not None]
    try:
        with cast(BinaryIO, _Joined(service.files, parts)) as source:
            kept = keep_upload(service, upload, source)
    except FileNotFoundError:
        if (done := _done(service, upload)) is not None:
            return done
        raise infrastructure_error("bad_request", "A part is gone; upload the file again") from None
    with suppress(OSError):  # the records of the rest stay until they expire
        for row in found:
            service.files.delete(row.object_name)
            service.store.delete_file(row.id)
    return kept


def _done(service: Service, upload: Upload) -> FileRow | None:
    row = service.store.get_file(upload.file_id)
    return row if row is not None and row.key_id == upload.key_id else None


def _part_id(upload: Upload, number: int) -> str:
    return f"{upload.file_id}.{number}"


def listed_parts(body: dict[str, object]) -> list[tuple[int, str]]:
    """Returns number and ETag of the parts that a client lists, ordered by number.

    Raises:
        ServiceError: 400 if the list is invalid or incomplete.
    """
    parts = body.get("parts")
    if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_PARTS:
        raise infrastructure_error("bad_request", f"parts: give a list of 1 to {MAX_PARTS} parts")
    listed: dict[int, str] = {}
    for part in parts:
        number, etag = (part.get("partNumber"), part.get("etag")) if isinstance(part, dict) else (None, None)
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(etag, str):
            raise infrastructure_error("bad_request", "parts: each is {partNumber, etag}")
        if listed.setdefault(number, etag) != etag:
            raise infrastructure_error("bad_request", f"parts: part {number} is there twice")
    missing = next((number for number in range(1, len(listed) + 1) if number not in listed), None)
    if missing is not None:
        raise infrastructure_error("bad_request", f"parts: part {missing} is missing")
    return [(number, listed[number].removeprefix("W/").strip('"')) for number in sorted(listed)]


class _Joined(io.RawIOBase):
    """Reads parts one after the other and compares each with its digest."""

    def __init__(self, files: Files, parts: Sequence[_Part]) -> None:
        self._files = files
        self._parts = iter(parts)
        self._part: _Part | None = None
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        while True:
            if self._file is None or self._part is None:
                self._part = next(self._parts, None)
                if self._part is None:
                    return 0
                self._file = self._files.open(self._part.object_name)
                self._digest = hashlib.sha256()
            data = self._file.read(len(view))
            if data:
                self._digest.update(data)
                view[: len(data)] = data
                return len(data)
            self._file.close()
            self._file = None
            if self._digest.hexdigest() != self._part.digest:
                raise infrastructure_error("bad_request", f"Part {self._part.number} was uploaded anew meanwhile")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
