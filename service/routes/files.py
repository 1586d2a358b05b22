"""Files for everybody who knows their URL: whole, in ranges, or as the browser still has them."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import closing
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from ..errors import ServiceError
from ..store import FileRow
from ..uploads import is_file_id

if TYPE_CHECKING:
    from ..context import Service

CHUNK_BYTES = 256 * 1024
CACHE_SECONDS = 3600

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_SHOWN = re.compile(r"(image/(?!svg)[a-z0-9.+-]+|video/[a-z0-9.+-]+|audio/[a-z0-9.+-]+|text/plain)(?<!xml)")
"""What a browser may show in place; anything that it could execute is saved."""

router = APIRouter()


@router.api_route("/files/{file_id}/{file_name}", methods=["GET", "HEAD"])
async def get_file(request: Request, file_id: str, file_name: str) -> Response:
    """A file, or a range of it."""
    service: Service = request.app.state.service
    now = time.time()
    row = await asyncio.to_thread(service.store.get_file, file_id) if is_file_id(file_id) else None
    if row is None or row.name != file_name or (row.expires_at is not None and row.expires_at <= now):
        raise _missing()
    headers = _headers(row, now)
    if _matches(request.headers.get("If-None-Match", ""), headers["ETag"]):
        return Response(status_code=304, headers={name: headers[name] for name in ("ETag", "Cache-Control")})
    wanted = _range(request, row.size, headers["ETag"])
    start, end = wanted or (0, row.size)
    status = 200
    if wanted is not None:
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{row.size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    try:
        file = await asyncio.to_thread(service.files.open, row.object_name, start)
    except FileNotFoundError:  # it expires at this moment, or was written anew
        raise _missing() from None
    return StreamingResponse(_chunks(file, end - start), status, headers)


def etag_of(row: FileRow) -> str:
    """The ETag of a file; a file that is written anew has another object."""
    return f'"{hashlib.sha256(row.object_name.encode()).hexdigest()[:32]}"'


async def _chunks(file: BinaryIO, left: int) -> AsyncIterator[bytes]:
    with closing(file):
        while left > 0:
            chunk = await asyncio.to_thread(file.read, min(left, CHUNK_BYTES))
            if not chunk:
                raise OSError("an object is shorter than it was")
            left -= len(chunk)
            yield chunk


def _headers(row: FileRow, now: float) -> dict[str, str]:
    left = CACHE_SECONDS if row.expires_at is None else min(CACHE_SECONDS, int(row.expires_at - now))
    where = "inline" if _SHOWN.fullmatch(row.content_type) else "attachment"
    return {
        "Content-Type": row.content_type,
        "Content-Disposition": f"{where}; filename*=UTF-8''{quote(row.name, safe='')}",
        "ETag": etag_of(row),
        "Accept-Ranges": "bytes",
        "Cache-Control": f"public, max-age={left}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }


def _matches(header: str, etag: str) -> bool:
    given = {part.strip().removeprefix("W/") for part in header.split(",")}
    return etag in given or "*" in given


def _range(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """First byte and the one after the last. What is not one range of bytes is ignored, as RFC 9110 allows.

    Raises:
        ServiceError: 416, the file has no byte in the range.
    """
    found = _RANGE.fullmatch(request.headers.get("Range", "").replace(" ", "").lower())
    if found is None or found.groups() == ("", "") or request.headers.get("If-Range", etag) != etag:
        return None
    first, last = found.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start >= end:
        raise ServiceError(416, "No byte of the file is in this range", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _missing() -> ServiceError:
    return ServiceError(404, "File not found, or it has expired")
