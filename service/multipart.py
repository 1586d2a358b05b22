"""Uploads in parts. All state is in the token, the store and the files, so that any machine takes any part."""

import asyncio
import hashlib
import io
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from starlette.requests import Request

from .errors import ServiceError, infrastructure_error
from .settings import DAY
from .store import FileRow
from .tokens import Kind, make_token, read_token
from .uploads import OCTETS, Received, keep_file, read_object, received, room_on_disk

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from .context import Service

MAX_PARTS = 1000
LIST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that will be: who may write it, and what it is called then; `seconds` is its lifetime."""

    key_id: str
    file_id: str
    name: str
    content_type: str
    seconds: float | None

    def token(self, service: "Service", kind: Kind, seconds: float) -> str:
        """A token that lets its holder write the file for `seconds`."""
        return make_token(service.secret, kind, asdict(self), time.time() + seconds)

    @classmethod
    def of_token(cls, service: "Service", kind: Kind, token: str, file_id: str) -> "Upload":
        """What a token allows.

        Raises:
            ServiceError: 403, it is forged, has expired, or is for another file.
        """
        upload = cls(**read_token(service.secret, kind, token, time.time()))
        if upload.file_id != file_id:
            raise ServiceError(403, "The upload is another file's")
        return upload


@dataclass(frozen=True, slots=True)
class _Part:
    number: int
    object_name: str
    digest: str


async def put_part(service: "Service", request: Request, upload: Upload, number: str) -> str:
    """Keeps a part, in place of an earlier one of this number; returns its ETag.

    Raises:
        ServiceError: 400 where the number is not one, 413 where the parts are too much, and as `uploads.received`.
    """
    if not (number.isascii() and number.isdigit() and len(number) < 6 and 1 <= int(number) <= MAX_PARTS):
        raise infrastructure_error("bad_request", f"Parts have numbers from 1 to {MAX_PARTS}")
    async with received(service, request, service.settings.part_bytes) as body:
        await asyncio.to_thread(_keep_part, service, upload, int(number), body)
    return f'"{body.digest}"'


def _keep_part(service: "Service", upload: Upload, number: int, body: Received) -> None:
    now, limit = time.time(), service.settings.upload_bytes
    name = f"parts/{upload.file_id}-{number}"
    # a row like a file's, so that it expires like one; no URL leads to an id with a dot
    row = FileRow(_part_id(upload, number), upload.key_id, body.digest, OCTETS, body.size, name, now, now + DAY)
    every = [_part_id(upload, one) for one in range(1, MAX_PARTS + 1)]
    if not service.store.add_part(row, every, limit):  # ahead of the bytes, which no crash leaves unknown
        raise _too_large(limit)
    with room_on_disk():
        service.files.put(name, body.path)


async def complete(service: "Service", request: Request, upload: Upload) -> FileRow:
    """Joins the parts that the body lists, in the order of their numbers. A second time does no harm.

    Raises:
        ServiceError: 400 where a part is missing or another than the client sent.
    """
    listed = _listed(await read_object(service, request, LIST_BYTES))
    return await asyncio.to_thread(_complete, service, upload, listed)


def _complete(service: "Service", upload: Upload, listed: Sequence[tuple[int, str]]) -> FileRow:
    if (done := _done(service, upload)) is not None:
        return done
    rows = [(service.store.get_file(_part_id(upload, number)), number, etag) for number, etag in listed]
    parts = []
    for row, number, etag in rows:
        if row is None or row.key_id != upload.key_id:
            # a client that had no answer completes again, while the first time is about to succeed
            if (done := _done(service, upload)) is not None:
                return done
            raise infrastructure_error("bad_request", f"Part {number} was not uploaded")
        if row.name != etag:
            raise infrastructure_error("bad_request", f"Part {number} has another etag than the one given")
        parts.append(_Part(number, row.object_name, row.name))
    found = [row for row, *_ in rows if row is not None]
    try:
        with cast(BinaryIO, _Joined(service, parts)) as source:
            kept = keep_file(
                service,
                source,
                key_id=upload.key_id,
                name=upload.name,
                content_type=upload.content_type,
                seconds=upload.seconds,
                file_id=upload.file_id,
            )
    except FileNotFoundError:
        if (done := _done(service, upload)) is not None:
            return done
        raise infrastructure_error("bad_request", "A part is gone; upload the file again") from None
    for row in found:
        with suppress(OSError):
            service.files.delete(row.object_name)
        service.store.delete_file(row.id)
    return kept


def _done(service: "Service", upload: Upload) -> FileRow | None:
    row = service.store.get_file(upload.file_id)
    return row if row is not None and row.key_id == upload.key_id else None


def _too_large(limit: int) -> ServiceError:
    return ServiceError(413, f"The file is too large; allowed are {limit} bytes", "file_too_large")


def _part_id(upload: Upload, number: int) -> str:
    return f"{upload.file_id}.{number}"


def _listed(body: dict[str, object]) -> list[tuple[int, str]]:
    """Numbers and digests, by number; clients list the parts as they were done."""
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
    """Parts one after the other, each compared with its digest."""

    def __init__(self, service: "Service", parts: Sequence[_Part]) -> None:
        self._files = service.files
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
