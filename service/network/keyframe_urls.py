"""Saves a keyframe's image from its URL: a data URI, a file of this server, or a URL of a public host."""

import asyncio
import base64
import binascii
import logging
import re
import shutil
from contextlib import suppress
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urlsplit

import numpy as np

from .. import clock
from ..components import Service
from ..objects.object_stores import COPY_BYTES
from ..objects.stored_files import find_file, has_expired
from ..protocol.errors import ServiceError, field_error
from ..store import FileRow
from .downloads import MAX_URL, FetchError, FetchTooLarge, fetch

MAX_DATA_URI = 10 * 2**20
"""Longest data URI, in characters, as on fal."""
SCHEMES = {"http", "https"}
MISSING = "this server has no such file, or it has expired"

_HEX = np.full(256, -1, np.int16)
"""The value of each hexadecimal digit, by its code; -1 for other characters."""
for _digit in "0123456789abcdefABCDEF":
    _HEX[ord(_digit)] = int(_digit, 16)

_FILE_PATH = re.compile(r"/files/([^/]+)/([^/]+)$")

_log = logging.getLogger(__name__)


async def save_keyframe(
    service: Service, url: str, file: BinaryIO, field: str, own_bases: tuple[str, ...] = ()
) -> None:
    """Writes the image of a keyframe to a file.

    Args:
        service: whose files and limits are used.
        url: `data:`, http or https, as the caller gave it.
        file: receives the bytes. The runner checks later whether they are an image.
        field: field of the input, for errors.
        own_bases: base URLs of this server, in addition to `Settings.public_url`.

    Raises:
        ServiceError: 422 `file_download_error` or `file_too_large`.
        OSError: the file cannot be written.
    """
    limit = service.settings.image_bytes
    if url[:5].lower() == "data:":
        if len(url) > MAX_DATA_URI:
            raise _too_large(field, MAX_DATA_URI)
        data = await asyncio.to_thread(_data_of, url)
        if data is None:
            raise _failed(field, "the data URI is damaged")
        if len(data) > limit:
            raise _too_large(field, limit)
        await asyncio.to_thread(file.write, data)
        return
    if len(url) > MAX_URL:
        raise _failed(field, f"the URL is longer than {MAX_URL} characters")
    own = await _own_file(service, url)
    if own is not None:
        await asyncio.to_thread(_copy_stored, service, *own, file, field, limit)
        return
    if _is_below(url, (*own_bases, *([service.settings.public_url] if service.settings.public_url else []))):
        raise _failed(field, MISSING)
    await _download(service, url, file, field, limit)


async def _download(service: Service, url: str, file: BinaryIO, field: str, limit: int) -> None:
    settings = service.settings
    try:
        await fetch(
            url,
            file,
            limit_bytes=limit,
            seconds=settings.fetch_seconds,
            redirects=settings.fetch_redirects,
            allow=settings.allow_private,
        )
    except FetchTooLarge:
        raise _too_large(field, limit) from None
    except FetchError as error:
        _log.info("%s was not downloaded: %s", field, error.reason)
        raise _failed(field, str(error), url) from None


def _data_of(url: str) -> bytes | None:
    """Returns the bytes in a data URI (RFC 2397); None if it is damaged."""
    head, comma, text = url[5:].partition(",")
    if not comma:
        return None
    data = _unquote(text.encode(errors="replace"))
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return data
    data = data.translate(None, b" \t\r\n\f").rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        return None


def _unquote(data: bytes) -> bytes:
    """Returns what `urllib.parse.unquote_to_bytes` does. That one would keep the server from its other work."""
    if b"%" not in data:
        return data
    codes = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(codes[:-2] == ord("%")) if len(codes) > 2 else np.empty(0, np.int64)
    high, low = _HEX[codes[at + 1]], _HEX[codes[at + 2]]
    valid = (high >= 0) & (low >= 0)
    at, values = at[valid], (high * 16 + low)[valid]
    made, kept = codes.copy(), np.ones(len(codes), bool)
    made[at] = values
    kept[at + 1] = kept[at + 2] = False
    return made[kept].tobytes()


async def _own_file(service: Service, url: str) -> tuple[FileRow, str] | None:
    """Returns the file of this server that a URL means, and the name in the URL; None if it means another file.

    Only the id is compared, since it is 128 random bits. Callers may know this server by many hosts and ports.
    """
    with suppress(ValueError):  # not a URL; the download reports that
        parts = urlsplit(url)
        found = _FILE_PATH.search(parts.path) if parts.scheme in SCHEMES else None
        row = await find_file(service, found[1]) if found is not None else None
        if found is not None and row is not None:
            return row, unquote(found[2])
    return None


def _is_below(url: str, bases: tuple[str, ...]) -> bool:
    """Returns whether a URL has the form of a file's URL on this server. The file may not exist."""
    with suppress(ValueError):
        parts = urlsplit(url)
        for base in bases:
            own = urlsplit(base)
            prefix = f"{own.path.rstrip('/')}/files/"
            if parts.scheme in SCHEMES and _authority(parts) == _authority(own) and parts.path.startswith(prefix):
                return True
    return False


def _authority(parts: SplitResult) -> tuple[str | None, int | None]:
    # TLS may end at this server or at a proxy in front of it
    return parts.hostname, None if parts.port in (80, 443) else parts.port


def _copy_stored(service: Service, row: FileRow, name: str, file: BinaryIO, field: str, limit: int) -> None:
    if row.name != name or has_expired(row, clock.now()):
        raise _failed(field, MISSING)
    if row.size > limit:
        raise _too_large(field, limit)
    try:
        with service.files.open(row.object_name) as stored:
            shutil.copyfileobj(stored, file, COPY_BYTES)
    except FileNotFoundError:
        raise _failed(field, MISSING) from None


def _failed(field: str, reason: str, url: str | None = None) -> ServiceError:
    return field_error(field, f"The file cannot be downloaded: {reason}", "file_download_error", None, url)


def _too_large(field: str, limit: int) -> ServiceError:
    message = f"The file is too large; allowed are {limit} bytes"
    return field_error(field, message, "file_too_large", {"max_size": limit})
