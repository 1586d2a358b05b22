"""Request bodies, received in bounded memory and time."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request

from ..components import Service
from ..objects.disk_space import check_free_space, disk_full_is_507
from ..protocol.errors import ServiceError, infrastructure_error

WRITE_BYTES = 256 * 1024
"""A body is written to disk in blocks of about this size."""
DESCRIPTION_BYTES = 65_536
"""Largest body that only describes an upload or a token."""
SLOWEST = 8 * 1024
"""Lowest average rate of a body, in bytes per second, once twice the longest allowed silence has passed."""


@dataclass(frozen=True, slots=True)
class Received:
    """A body in a temporary file, which exists until its block ends; `digest` is its SHA-256 in hex."""

    path: Path
    size: int
    digest: str


@asynccontextmanager
async def received(service: Service, request: Request, limit: int, key_id: str) -> AsyncIterator[Received]:
    """Writes the body of a request to a temporary file, when a slot of `Service.bodies` is free.

    Raises:
        ServiceError: 413 if it has more than `limit` bytes, 400 if it stops arriving, 429 if too many bodies arrive at
            once, 499 if the client disconnects, 507 if the disk is full.
    """
    async with service.bodies.hold(key_id), _written(service, request, limit) as body:
        yield body


@asynccontextmanager
async def _written(service: Service, request: Request, limit: int) -> AsyncIterator[Received]:
    await check_free_space(service)
    folder = service.settings.incoming
    path = folder / token_hex(12)
    digest = hashlib.sha256()
    size = 0
    try:
        with disk_full_is_507():
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            file = await asyncio.to_thread(path.open, "xb")
            try:
                async for block in _blocks(request, limit, service.settings.body_seconds):
                    size += len(block)
                    await asyncio.to_thread(_write, file, digest, block)
            finally:
                await asyncio.to_thread(file.close)
        yield Received(path, size, digest.hexdigest())
    finally:
        await asyncio.to_thread(path.unlink, missing_ok=True)


async def read_body(service: Service, request: Request, limit: int) -> bytes:
    """Returns the whole of a small body; raises as `received` does."""
    await check_free_space(service)
    return b"".join([block async for block in _blocks(request, limit, service.settings.body_seconds)])


async def read_object(service: Service, request: Request, limit: int = DESCRIPTION_BYTES) -> dict[str, object]:
    """Returns the JSON object in a small body; raises as `received` does, and 400 if the body is anything else."""
    try:
        value = json.loads(await read_body(service, request, limit) or b"{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise infrastructure_error("bad_request", "The body has to be a JSON object")
    return value


def declared_length(request: Request, limit: int) -> int:
    """Returns the length of the body, or 0 if the head does not tell it. Raises ServiceError 413 above `limit`."""
    length = request.headers.get("Content-Length", "")
    if not length.isdigit():
        return 0
    if int(length) > limit:
        raise _too_large(limit)
    return int(length)


async def _blocks(request: Request, limit: int, silence: float) -> AsyncIterator[bytes]:
    """Yields a body in blocks of about `WRITE_BYTES`."""
    declared_length(request, limit)
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
