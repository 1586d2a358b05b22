"""Uploads from fal's clients: with a storage token (Python) or to a signed URL (JavaScript)."""

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .. import clock
from ..auth.callers import KeyId, UploaderKeyId
from ..auth.signed_tokens import make_token
from ..auth.upload_permissions import OwnParts, SignedFile, SignedParts
from ..auth.upload_tokens import Upload
from ..components import CurrentService, Service
from ..http.called_url import base_url
from ..http.request_bodies import declared_length, read_object, received
from ..objects.file_metadata import lifetime_in_header, name_in_header, safe_content_type, safe_name
from ..objects.multipart_uploads import LIST_BYTES, complete, keep_part, listed_parts, part_number
from ..objects.stored_files import check_room, etag_of, file_url, keep_upload, new_file_id
from ..protocol.errors import infrastructure_error
from ..settings import DAY
from ..store import FileRow

TOKEN_SECONDS = 3600.0
GRACE_SECONDS = 600.0
"""A token is valid for this much longer than its client knows, so that an upload that has begun can finish."""

router = APIRouter()


@router.post("/storage/auth/token")
async def storage_token(service: CurrentService, key_id: KeyId, request: Request) -> Response:
    """Returns a token for uploads with the caller's key (Python)."""
    expires_at = clock.now() + TOKEN_SECONDS
    token = make_token(service.secret, "bearer", {"key_id": key_id}, expires_at + GRACE_SECONDS)
    return JSONResponse(
        {
            "token": token,
            "token_type": "Bearer",
            "base_url": base_url(service.settings, request),
            "expires_at": datetime.fromtimestamp(int(expires_at), UTC).isoformat(),
        }
    )


@router.post("/files/upload")
async def upload_file(service: CurrentService, key_id: UploaderKeyId, request: Request) -> Response:
    """Stores a whole file (Python)."""
    row = await _receive(service, request, _upload_in_headers(service, request, key_id))
    url = file_url(base_url(service.settings, request), row)
    return JSONResponse({"access_url": url, "url": url})


@router.post("/files/upload/multipart")
async def start_multipart(service: CurrentService, key_id: UploaderKeyId, request: Request) -> Response:
    """Begins an upload in parts (Python)."""
    upload = _upload_in_headers(service, request, key_id)
    upload_id = upload.token(service.secret, "multipart", DAY)
    return JSONResponse({"access_url": upload.file_url(base_url(service.settings, request)), "uploadId": upload_id})


@router.put("/files/{file_id}/{file_name}/multipart/{upload_id}/{number}")
async def upload_part(service: CurrentService, upload: OwnParts, request: Request, number: str) -> Response:
    """Stores a part (Python)."""
    return await _receive_part(service, request, upload, part_number(number))


@router.post("/files/{file_id}/{file_name}/multipart/{upload_id}/complete")
async def complete_multipart(service: CurrentService, upload: OwnParts, request: Request) -> Response:
    """Joins the parts (Python)."""
    url = file_url(base_url(service.settings, request), await _join(service, request, upload))
    return JSONResponse({"access_url": url, "url": url})


@router.post("/storage/upload/initiate")
async def initiate(service: CurrentService, key_id: KeyId, request: Request) -> Response:
    """Returns a signed URL for the upload of a file, and the file's later URL (JavaScript; Python as a fallback)."""
    upload = await _upload_in_body(service, request, key_id)
    token = upload.token(service.secret, "upload", TOKEN_SECONDS + GRACE_SECONDS)
    return _signed_urls(service, request, upload, token)


@router.post("/storage/upload/initiate-multipart")
async def initiate_multipart(service: CurrentService, key_id: KeyId, request: Request) -> Response:
    """Returns the same two URLs for an upload in parts (JavaScript)."""
    upload = await _upload_in_body(service, request, key_id)
    return _signed_urls(service, request, upload, upload.token(service.secret, "multipart", DAY))


@router.put("/storage/upload/{file_id}")
async def put_signed(service: CurrentService, upload: SignedFile, request: Request) -> Response:
    """Stores a whole file that arrives at its signed URL."""
    row = await _receive(service, request, upload)
    url = file_url(base_url(service.settings, request), row)
    return JSONResponse({"file_url": url}, headers={"ETag": etag_of(row)})


@router.put("/storage/upload/{file_id}/{number}")
async def put_signed_part(service: CurrentService, upload: SignedParts, request: Request, number: str) -> Response:
    """Stores a part that arrives at its signed URL (JavaScript)."""
    return await _receive_part(service, request, upload, part_number(number))


@router.post("/storage/upload/{file_id}/complete")
async def complete_signed(service: CurrentService, upload: SignedParts, request: Request) -> Response:
    """Joins the parts (JavaScript)."""
    row = await _join(service, request, upload)
    return JSONResponse({"file_url": file_url(base_url(service.settings, request), row)})


def _upload_in_headers(service: Service, request: Request, key_id: str) -> Upload:
    kind = safe_content_type(request.headers.get("Content-Type"))
    return _new_upload(service, request, key_id, name_in_header(request.headers), kind)


async def _upload_in_body(service: Service, request: Request, key_id: str) -> Upload:
    about = await read_object(service, request)
    name, kind = about.get("file_name"), about.get("content_type")
    if not isinstance(name, str | None) or not isinstance(kind, str | None):
        raise infrastructure_error("bad_request", "file_name and content_type have to be texts")
    return _new_upload(service, request, key_id, name, safe_content_type(kind))


def _new_upload(service: Service, request: Request, key_id: str, name: str | None, kind: str) -> Upload:
    seconds = lifetime_in_header(request.headers, service.settings)
    return Upload(key_id, new_file_id(), safe_name(name, kind), kind, seconds)


async def _receive(service: Service, request: Request, upload: Upload) -> FileRow:
    settings = service.settings
    await check_room(service, upload.key_id, declared_length(request, settings.upload_bytes))
    async with received(service, request, settings.upload_bytes, upload.key_id) as body:
        return await asyncio.to_thread(keep_upload, service, upload, body.path, settings.key_bytes)


async def _receive_part(service: Service, request: Request, upload: Upload, number: int) -> Response:
    await check_room(service, upload.key_id, declared_length(request, service.settings.part_bytes))
    async with received(service, request, service.settings.part_bytes, upload.key_id) as body:
        await asyncio.to_thread(keep_part, service, upload, number, body.path, body.size, body.digest)
    etag = f'"{body.digest}"'
    return JSONResponse({"partNumber": number, "etag": etag}, headers={"ETag": etag})


async def _join(service: Service, request: Request, upload: Upload) -> FileRow:
    listed = listed_parts(await read_object(service, request, LIST_BYTES))
    return await asyncio.to_thread(complete, service, upload, listed)


def _signed_urls(service: Service, request: Request, upload: Upload, token: str) -> Response:
    base = base_url(service.settings, request)
    upload_url = f"{base}/storage/upload/{upload.file_id}?token={token}"
    return JSONResponse({"upload_url": upload_url, "file_url": upload.file_url(base)})
