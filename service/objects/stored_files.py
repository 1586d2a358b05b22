"""Files that callers can fetch: uploads and clips. The store has their records, an object store their bytes."""

import hashlib
import logging
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex, token_urlsafe
from typing import BinaryIO

from sqlalchemy.exc import SQLAlchemyError

from .. import clock
from ..auth.upload_tokens import Upload
from ..components import Service
from ..protocol.errors import ServiceError, quota_error
from ..protocol.urls import stored_file_url
from ..settings import DAY
from ..store import FileRow, QuotaExceeded
from .disk_space import disk_full_is_507
from .object_stores import FilesUnavailable

CLIP_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".webp": "image/webp"}

_log = logging.getLogger(__name__)
_FILE_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")


def new_file_id() -> str:
    """Returns an id that cannot be guessed. Everybody who knows a file's URL can fetch it."""
    return token_urlsafe(16)


def file_url(base_url: str, row: FileRow) -> str:
    """Returns the URL of a file under the service's base URL."""
    return stored_file_url(base_url, row.id, row.name)


def etag_of(row: FileRow) -> str:
    """Returns the ETag of a file. A file that is written again gets a new object and so a new ETag."""
    return f'"{hashlib.sha256(row.object_name.encode()).hexdigest()[:32]}"'


def has_expired(row: FileRow, now: float) -> bool:
    """Returns whether the lifetime of a file is over."""
    return row.expires_at is not None and row.expires_at <= now


async def find_file(service: Service, file_id: str) -> FileRow | None:
    """Returns the record of a file, expired or not. Parts of uploads, whose ids have a dot, are not files."""
    if not _FILE_ID.fullmatch(file_id):
        return None
    return await service.store.read(service.store.get_file, file_id)


async def check_room(service: Service, key_id: str, size: int) -> None:
    """Raises ServiceError 507 if a file of `size` bytes that is about to arrive does not fit beside its key's."""
    try:
        await service.store.read(service.store.check_room, key_id, size, service.settings.key_bytes)
    except QuotaExceeded as error:
        raise quota_error(error) from None


def keep_file(
    service: Service,
    source: BinaryIO | Path | bytes,
    *,
    key_id: str,
    name: str,
    content_type: str,
    seconds: float | None,
    file_id: str | None = None,
    key_bytes: int | None = None,
) -> FileRow:
    """Writes bytes to the object store and records them as a file. Blocks.

    Args:
        service: whose stores are used.
        source: the bytes.
        key_id: owner of the file.
        name: as `safe_name` returns it.
        content_type: as `safe_content_type` returns it.
        seconds: lifetime; None keeps the file for ever.
        file_id: id of the file; replaces the owner's file of this id. None means a new id.
        key_bytes: most bytes that may be stored for the owner; None stores these in any case.

    Raises:
        ServiceError: 403 if a file of this id belongs to another key, 507 if the disk is full or the owner has no
            bytes left.
    """
    file_id = file_id or new_file_id()
    old = service.store.get_file(file_id)
    if old is not None and old.key_id != key_id:
        raise ServiceError(403, "This file belongs to another key")
    object_name = _object_name(file_id)
    now = clock.now()
    # record the object before its bytes, for a day: otherwise a crash would leave bytes without a record
    announced = FileRow(
        f"{file_id}.{token_hex(4)}", key_id, name, content_type, _size(source), object_name, now, now + DAY
    )
    try:
        service.store.add_file(announced, key_bytes=key_bytes)
    except QuotaExceeded as error:
        raise quota_error(error) from None
    try:
        with disk_full_is_507():
            size = service.files.put(object_name, source)
        expires_at = None if seconds is None else now + seconds
        row = FileRow(file_id, key_id, name, content_type, size, object_name, now, expires_at)
        replaced = service.store.add_file(row, announced.id)
    except FilesUnavailable:  # the object may have been written: its record stays until it expires
        raise
    except BaseException:
        service.files.delete(object_name)
        with suppress(SQLAlchemyError):  # it expires within a day
            service.store.delete_file(announced.id)
        raise
    if replaced is not None:
        service.files.delete(replaced.object_name)
    return row


def _object_name(file_id: str) -> str:
    """Returns a new name for the object of a file, so that readers of an old one can finish."""
    return f"objects/{file_id}-{token_hex(4)}"


def _size(source: BinaryIO | Path | bytes) -> int:
    """Returns how many bytes are announced. An open file consists of parts of an upload, which have records."""
    if isinstance(source, Path):
        return source.stat().st_size
    return len(source) if isinstance(source, bytes) else 0


def announced_clip(key_id: str, ending: str) -> FileRow:
    """Returns the record of a clip that will be made. Without a size it is not stored yet, and expires within a day.

    Args:
        key_id: the API key that it counts for.
        ending: a key of `CLIP_TYPES`.
    """
    now, file_id = clock.now(), new_file_id()
    name = f"{token_hex(8)}{ending}"
    return FileRow(file_id, key_id, name, CLIP_TYPES[ending], 0, _object_name(file_id), now, now + DAY)


def store_clip(service: Service, clip: FileRow, source: Path) -> FileRow:
    """Writes an announced clip to the object store, and returns its record with the size. Blocks.

    Raises:
        ServiceError: 507 if the disk is full.
    """
    with disk_full_is_507():
        return replace(clip, size=service.files.put(clip.object_name, source))


def keep_upload(
    service: Service, upload: Upload, source: BinaryIO | Path | bytes, key_bytes: int | None = None
) -> FileRow:
    """Stores the file of an upload; blocks, and raises as `keep_file` does."""
    return keep_file(
        service,
        source,
        key_id=upload.key_id,
        name=upload.name,
        content_type=upload.content_type,
        seconds=upload.seconds,
        file_id=upload.file_id,
        key_bytes=key_bytes,
    )


def remove_expired_files(service: Service, now: float) -> int:
    """Removes expired files, parts of uploads that were not completed within a day, and leftovers of crashes.

    Blocks. Returns the number of files and parts removed.
    """
    for path in service.settings.incoming.glob("*"):
        with suppress(OSError):
            if path.stat().st_mtime < now - DAY:
                path.unlink()
    removed = 0
    deleted = True
    while deleted and (rows := service.store.expired_files(now)):  # the store returns 500 at a time
        deleted = False
        for row in rows:
            try:
                service.files.delete(row.object_name)
            except FilesUnavailable as error:  # the next sweep goes on
                _log.warning("expired files were not deleted: %s", error)
                return removed
            except OSError as error:
                _log.warning("%s was not deleted: %s", row.object_name, error)
                continue
            service.store.delete_file(row.id)
            removed += 1
            deleted = True
    return removed
