"""Uploads as fal's clients make them: with a storage token (Python) or to a signed URL (JavaScript)."""

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..errors import ServiceError, infrastructure_error
from ..keys import ANONYMOUS
from ..multipart import Upload, complete, put_part
from ..settings import DAY
from ..store import FileRow
from ..tokens import make_token, read_token
from ..uploads import (
    Received,
    file_url,
    header_name,
    keep_file,
    new_file_id,
    object_seconds,
    read_object,
    received,
    safe_content_type,
    safe_name,
)
from .files import etag_of

if TYPE_CHECKING:
    from ..context import Service

TOKEN_SECONDS = 3600.0
GRACE_SECONDS = 600.0
"""How much longer a token holds than its client believes, so that an upload which has begun can end."""

router = APIRouter()


@router.post("/storage/auth/token")
async def storage_token(request: Request) -> Response:
    """A token for uploads of the caller's key (Python)."""
    service: Service = request.app.state.service
    key_id = await service.authenticate(request)
    expires_at = time.time() + TOKEN_SECONDS
    token = make_token(service.secret, "bearer", {"key_id": key_id}, expires_at + GRACE_SECONDS)
    return JSONResponse(
        {
            "token": token,
            "token_type": "Bearer",
            "base_url": service.base_url(request),
            "expires_at": datetime.fromtimestamp(int(expires_at), UTC).isoformat(),
        }
    )


@router.post("/files/upload")
async def upload_file(request: Request) -> Response:
    """A whole file (Python)."""
    service: Service = request.app.state.service
    upload = _announced(service, request, await _uploader(service, request))
    async with received(service, request, service.settings.upload_bytes) as body:
        row = await _keep(service, upload, body)
    url = file_url(service.base_url(request), row)
    return JSONResponse({"access_url": url, "url": url})


@router.post("/files/upload/multipart")
async def start_multipart(request: Request) -> Response:
    """Begins an upload in parts (Python)."""
    service: Service = request.app.state.service
    upload = _announced(service, request, await _uploader(service, request))
    return JSONResponse(
        {
            "access_url": _url(service.base_url(request), upload),
            "uploadId": upload.token(service, "multipart", DAY),
        }
    )


@router.put("/files/{file_id}/{file_name}/multipart/{upload_id}/{number}")
async def upload_part(request: Request, file_id: str, upload_id: str, number: str) -> Response:
    """A part (Python)."""
    service: Service = request.app.state.service
    upload = await _own_upload(service, request, file_id, upload_id)
    etag = await put_part(service, request, upload, number)
    return JSONResponse({"partNumber": int(number), "etag": etag}, headers={"ETag": etag})


@router.post("/files/{file_id}/{file_name}/multipart/{upload_id}/complete")
async def complete_multipart(request: Request, file_id: str, upload_id: str) -> Response:
    """Joins the parts (Python)."""
    service: Service = request.app.state.service
    upload = await _own_upload(service, request, file_id, upload_id)
    url = file_url(service.base_url(request), await complete(service, request, upload))
    return JSONResponse({"access_url": url, "url": url})


@router.post("/storage/upload/initiate")
async def initiate(request: Request) -> Response:
    """URLs to upload a file to and to find it at (JavaScript; Python as its second choice)."""
    service: Service = request.app.state.service
    upload = await _described(service, request)
    return _signed(service, request, upload, upload.token(service, "upload", TOKEN_SECONDS + GRACE_SECONDS))


@router.post("/storage/upload/initiate-multipart")
async def initiate_multipart(request: Request) -> Response:
    """The same for an upload in parts (JavaScript)."""
    service: Service = request.app.state.service
    upload = await _described(service, request)
    return _signed(service, request, upload, upload.token(service, "multipart", DAY))


@router.put("/storage/upload/{file_id}")
async def put_signed(request: Request, file_id: str) -> Response:
    """A whole file to its signed URL. Python sends its key along, which counts for nothing here."""
    service: Service = request.app.state.service
    upload = Upload.of_token(service, "upload", request.query_params.get("token", ""), file_id)
    await check_key(service, upload.key_id, 403)
    async with received(service, request, service.settings.upload_bytes) as body:
        row = await _keep(service, upload, body)
    return JSONResponse({"file_url": file_url(service.base_url(request), row)}, headers={"ETag": etag_of(row)})


@router.put("/storage/upload/{file_id}/{number}")
async def put_signed_part(request: Request, file_id: str, number: str) -> Response:
    """A part to its signed URL (JavaScript)."""
    service: Service = request.app.state.service
    upload = await _signed_parts(service, request, file_id)
    etag = await put_part(service, request, upload, number)
    return JSONResponse({"partNumber": int(number), "etag": etag}, headers={"ETag": etag})


@router.post("/storage/upload/{file_id}/complete")
async def complete_signed(request: Request, file_id: str) -> Response:
    """Joins the parts (JavaScript)."""
    service: Service = request.app.state.service
    upload = await _signed_parts(service, request, file_id)
    row = await complete(service, request, upload)
    return JSONResponse({"file_url": file_url(service.base_url(request), row)})


async def _uploader(service: "Service", request: Request) -> str:
    """The key of a storage token; a key itself, which has a colon, is taken too."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or ":" in token:
        return await service.authenticate(request)
    claims = read_token(service.secret, "bearer", token.strip(), time.time())
    await check_key(service, claims["key_id"], 401)
    return str(claims["key_id"])


async def check_key(service: "Service", key_id: str, status: int) -> None:
    """A token does not outlive the key that it was made for."""
    if key_id == ANONYMOUS and service.settings.anonymous:
        return
    row = await asyncio.to_thread(service.store.get_key, key_id)
    if row is None or row.revoked_at is not None:
        raise ServiceError(status, "The key of this upload is no longer valid")


async def _own_upload(service: "Service", request: Request, file_id: str, upload_id: str) -> Upload:
    key_id = await _uploader(service, request)
    upload = Upload.of_token(service, "multipart", upload_id, file_id)
    if upload.key_id != key_id:
        raise ServiceError(403, "The upload belongs to another key")
    return upload


async def _signed_parts(service: "Service", request: Request, file_id: str) -> Upload:
    upload = Upload.of_token(service, "multipart", request.query_params.get("token", ""), file_id)
    await check_key(service, upload.key_id, 403)
    return upload


def _announced(service: "Service", request: Request, key_id: str) -> Upload:
    """An upload that the headers describe."""
    kind = safe_content_type(request.headers.get("Content-Type"))
    seconds = object_seconds(request.headers, service.settings.object_seconds)
    return Upload(key_id, new_file_id(), safe_name(header_name(request), kind), kind, seconds)


async def _described(service: "Service", request: Request) -> Upload:
    """An upload that the body describes."""
    key_id = await service.authenticate(request)
    about = await read_object(service, request)
    name, kind = about.get("file_name"), about.get("content_type")
    if not isinstance(name, str | None) or not isinstance(kind, str | None):
        raise infrastructure_error("bad_request", "file_name and content_type have to be texts")
    kind = safe_content_type(kind)
    seconds = object_seconds(request.headers, service.settings.object_seconds)
    return Upload(key_id, new_file_id(), safe_name(name, kind), kind, seconds)


def _signed(service: "Service", request: Request, upload: Upload, token: str) -> Response:
    base = service.base_url(request)
    return JSONResponse(
        {"upload_url": f"{base}/storage/upload/{upload.file_id}?token={token}", "file_url": _url(base, upload)}
    )


def _url(base: str, upload: Upload) -> str:
    return f"{base}/files/{upload.file_id}/{quote(upload.name, safe='')}"


async def _keep(service: "Service", upload: Upload, body: Received) -> FileRow:
    return await asyncio.to_thread(
        keep_file,
        service,
        body.path,
        key_id=upload.key_id,
        name=upload.name,
        content_type=upload.content_type,
        seconds=upload.seconds,
        file_id=upload.file_id,
    )
