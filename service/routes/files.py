"""Serves files to everybody who knows their URL: whole, in ranges, or 304 if the browser still has them."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import closing
from typing import BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from .. import clock
from ..components import CurrentService
from ..objects.stored_files import etag_of, find_file, has_expired
from ..protocol.errors import ServiceError
from ..store import FileRow

CHUNK_BYTES = 256 * 1024
CACHE_SECONDS = 3600

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_SHOWN = re.compile(r"(image/(?!svg)[a-z0-9.+-]+|video/[a-z0-9.+-]+|audio/[a-z0-9.+-]+|text/plain)(?<!xml)")
"""Content types that a browser may show. It saves all others, since it could execute them."""

router = APIRouter()


@router.api_route("/files/{file_id}/{file_name}", methods=["GET", "HEAD"])
async def get_file(service: CurrentService, request: Request, file_id: str, file_name: str) -> Response:
    """Returns a file, or a range of it."""
    now = clock.now()
    row = await find_file(service, file_id)
    if row is None or row.name != file_name or has_expired(row, now):
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
    except FileNotFoundError:  # it expired, or was written again, at this very moment
        raise _missing() from None
    return StreamingResponse(_chunks(file, end - start), status, headers)


async def _chunks(file: BinaryIO, left: int) -> AsyncIterator[bytes]:
    with closing(file):
        while left > 0:
            chunk = await asyncio.to_thread(file.read, min(left, CHUNK_BYTES))
            if not chunk:
                raise OSError("an object is shorter than its record says")
            left -= len(chunk)
            yield chunk


def _headers(row: FileRow, now: float) -> dict[str, str]:
    left = CACHE_SECONDS if row.expires_at is None else min(CACHE_SECONDS, int(row.expires_at - now))
    disposition = "inline" if _SHOWN.fullmatch(row.content_type) else "attachment"
    return {
        "Content-Type": row.content_type,
        "Content-Disposition": f"{disposition}; filename*=UTF-8''{quote(row.name, safe='')}",
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
    """Returns the first byte of the range and the byte after its end. Ignores all but a single range (RFC 9110).

    Raises:
        ServiceError: 416 if the file has no byte in the range.
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
