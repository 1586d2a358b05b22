"""Bodies that become files: received in bounded memory and time, named safely, kept for a while."""

import asyncio
import errno
import hashlib
import json
import logging
import math
import mimetypes
import re
import shutil
import time
import unicodedata
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex, token_urlsafe
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request

from .errors import ServiceError, infrastructure_error
from .settings import DAY, Settings
from .store import FileRow

if TYPE_CHECKING:
    from .context import Service

WRITE_BYTES = 2**20
ABOUT_BYTES = 65_536
"""Largest body that describes something."""
SLOWEST = 8 * 1024
"""Bytes a second that a body has to bring on average, once it was silent for twice the longest silence."""
MAX_NAME = 100
MAX_SECONDS = 10 * 365 * DAY
OCTETS = "application/octet-stream"

_log = logging.getLogger(__name__)
_FILE_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_CONTENT_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Received:
    """A body on this machine's disk, until its block ends; `digest` is its SHA-256 in hex."""

    path: Path
    size: int
    digest: str


@asynccontextmanager
async def received(service: "Service", request: Request, limit: int) -> AsyncIterator[Received]:
    """Writes the body of a request to a temporary file.

    Raises:
        ServiceError: 413 where it has more than `limit` bytes, 400 where it stops arriving, 499 where the client goes,
            507 where the disk is full.
    """
    check_room(service.settings)
    folder = temporary_folder(service)
    path = folder / token_hex(12)
    digest = hashlib.sha256()
    size = 0
    try:
        with room_on_disk():
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            with path.open("xb") as file:
                async for block in _blocks(request, limit, service.settings.body_seconds):
                    size += len(block)
                    await asyncio.to_thread(_write, file, digest, block)
        yield Received(path, size, digest.hexdigest())
    finally:
        path.unlink(missing_ok=True)


async def read_body(service: "Service", request: Request, limit: int) -> bytes:
    """The whole of a small body; raises as `received`."""
    check_room(service.settings)
    return b"".join([block async for block in _blocks(request, limit, service.settings.body_seconds)])


async def read_object(service: "Service", request: Request, limit: int = ABOUT_BYTES) -> dict[str, object]:
    """The JSON object in a small body; raises as `received`, and 400 where it is something else."""
    try:
        value = json.loads(await read_body(service, request, limit) or b"{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise infrastructure_error("bad_request", "The body has to be a JSON object")
    return value


async def _blocks(request: Request, limit: int, silence: float) -> AsyncIterator[bytes]:
    """A body in blocks of about `WRITE_BYTES`."""
    length = request.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    start = time.monotonic()
    total = 0
    block = bytearray()
    chunks = request.stream()
    while True:
        slow = start + 2 * silence + total / SLOWEST - time.monotonic()
        try:
            async with asyncio.timeout(max(min(silence, slow), 0)):
                chunk = await anext(chunks, None)
        except TimeoutError:
            # 400, since fal's clients send a body again after 408
            detail = "The body arrives too slowly"
            raise ServiceError(400, detail, "bad_request", {"Connection": "close"}) from None
        except ClientDisconnect:
            raise infrastructure_error("client_disconnected", "The client has gone") from None
        if chunk is None:
            break
        total += len(chunk)
        if total > limit:
            raise _too_large(limit)
        block += chunk
        if len(block) >= WRITE_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _write(file: BinaryIO, digest: "hashlib._Hash", block: bytes) -> None:
    file.write(block)
    digest.update(block)


def _too_large(limit: int) -> ServiceError:
    return ServiceError(413, f"The body is too large; allowed are {limit} bytes", "file_too_large")


@contextmanager
def room_on_disk() -> Iterator[None]:
    """Tells the caller where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room() from error


def check_room(settings: Settings) -> None:
    """Refuses work while there is too little space: what was accepted needs the rest.

    Raises:
        ServiceError: 507.
    """
    if shutil.disk_usage(settings.data).free < settings.free_bytes:
        raise _no_room()


def _no_room() -> ServiceError:
    return ServiceError(507, "The server has no space left for files", "internal_error")


def temporary_folder(service: "Service") -> Path:
    """Where bodies are while they arrive."""
    return service.settings.data / "tmp"


def new_file_id() -> str:
    """A name that cannot be guessed: files are public to everybody who knows their URL."""
    return token_urlsafe(16)


def is_file_id(text: str) -> bool:
    """Whether this may be the id of a file, and not of a part of an upload."""
    return _FILE_ID.fullmatch(text) is not None


def file_url(base: str, row: FileRow) -> str:
    """The URL of a file below the service's own."""
    return f"{base}/files/{row.id}/{quote(row.name, safe='')}"


def keep_file(
    service: "Service",
    source: BinaryIO | Path | bytes,
    *,
    key_id: str,
    name: str,
    content_type: str,
    seconds: float | None,
    file_id: str | None = None,
) -> FileRow:
    """Puts bytes into the store of files and makes them known; blocks.

    Args:
        service: of the server.
        source: the bytes.
        key_id: whose file it is.
        name, content_type: as `safe_name` and `safe_content_type` give them.
        seconds: its lifetime; None keeps it.
        file_id: writes this file of the key anew.

    Raises:
        ServiceError: 403 where the file is another key's, 507 where the disk is full.
    """
    file_id = file_id or new_file_id()
    old = service.store.get_file(file_id)
    if old is not None and old.key_id != key_id:
        raise ServiceError(403, "This file belongs to another key")
    object_name = f"objects/{file_id}-{token_hex(4)}"  # never an older one's: whoever reads that has it to the end
    now = time.time()
    announced = f"{file_id}.{token_hex(4)}"  # known before it is there, and for a day: else a crash would leave it
    service.store.add_file(FileRow(announced, key_id, name, content_type, 0, object_name, now, now + DAY))
    try:
        with room_on_disk():
            size = service.files.put(object_name, source)
        expires_at = None if seconds is None else now + seconds
        row = FileRow(file_id, key_id, name, content_type, size, object_name, now, expires_at)
        replaced = service.store.add_file(row, announced)
    except BaseException:
        service.files.delete(object_name)
        raise
    if replaced is not None:
        service.files.delete(replaced.object_name)
    return row


def remove_stale_uploads(service: "Service", now: float) -> int:
    """Removes what has expired: files, parts of uploads that nobody completed within a day, and what crashes left.

    To be called now and then; blocks. Returns how many files and parts it removed.
    """
    removed = 0
    gone = True
    while gone and (rows := service.store.expired_files(now)):  # it gives them in portions
        gone = False
        for row in rows:
            try:
                service.files.delete(row.object_name)
            except OSError as error:
                _log.warning("%s was not deleted: %s", row.object_name, error)
                continue
            service.store.delete_file(row.id)
            removed += 1
            gone = True
    for path in temporary_folder(service).glob("*"):
        with suppress(OSError):
            if path.stat().st_mtime < now - DAY:
                path.unlink()
    return removed


def safe_name(text: str | None, content_type: str = OCTETS) -> str:
    """A file name of letters, digits, "_", "-" and "." from what a user calls a file; never empty, never hidden."""
    name = unicodedata.normalize("NFC", text or "").replace("\\", "/").rpartition("/")[2]
    name = re.sub(r"[^\w.-]+", "_", name).strip("._")
    stem, dot, ending = name.rpartition(".")
    if not dot:
        stem, ending = name, ""
    if not stem:
        stem, ending = "file", (mimetypes.guess_extension(content_type) or ".bin")[1:]
    ending = ending[:16]
    while len(f"{stem}.{ending}".encode()) > MAX_NAME:
        stem = stem[:-1]
    return f"{stem}.{ending}" if ending else stem


def header_name(request: Request) -> str | None:
    """The file name that a client sent: UTF-8, though headers are read as Latin-1."""
    text = request.headers.get("X-Fal-File-Name")
    if text is None:
        return None
    with suppress(UnicodeError):
        return text.encode("latin-1").decode()
    return text


def safe_content_type(text: object) -> str:
    """A content type without its parameters; what is none becomes `application/octet-stream`."""
    kind = str(text or "").partition(";")[0].strip().lower()
    return kind if _CONTENT_TYPE.fullmatch(kind) else OCTETS


def object_seconds(headers: Mapping[str, str], default: float | None) -> float | None:
    """The lifetime in seconds that a client's lifecycle header asks for. Its access rules are ignored: URLs are public.

    Raises:
        ServiceError: 400, the header is not what fal's clients send.
    """
    text = headers.get("X-Fal-Object-Lifecycle") or headers.get("X-Fal-Object-Lifecycle-Preference")
    if not text:
        return default
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    seconds = value.get("expiration_duration_seconds") if isinstance(value, dict) else math.nan
    if seconds is None:
        return default
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        detail = 'X-Fal-Object-Lifecycle: give {"expiration_duration_seconds": n} with n above 0'
        raise infrastructure_error("bad_request", detail)
    return float(min(seconds, MAX_SECONDS))
