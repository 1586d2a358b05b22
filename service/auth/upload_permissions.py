"""Permissions to write an upload, read from signed tokens. Routes take them as dependencies."""

from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from ..components import Service
from ..protocol.errors import ServiceError
from .callers import UploaderKeyId, require_valid_key
from .upload_tokens import Upload


async def _signed_file(request: Request, file_id: str) -> Upload:
    """Returns the whole-file upload that the token in the query allows. Ignores the key that Python's client adds."""
    service: Service = request.app.state.service
    upload = Upload.from_token(service.secret, "upload", request.query_params.get("token", ""), file_id)
    await require_valid_key(service, upload.key_id, 403)
    return upload


async def _signed_parts(request: Request, file_id: str) -> Upload:
    """Returns the upload in parts that the token in the query allows."""
    service: Service = request.app.state.service
    upload = Upload.from_token(service.secret, "multipart", request.query_params.get("token", ""), file_id)
    await require_valid_key(service, upload.key_id, 403)
    return upload


async def _own_parts(request: Request, key_id: UploaderKeyId, file_id: str, upload_id: str) -> Upload:
    """Returns the upload whose id in the path is a token, if the caller's key began it."""
    service: Service = request.app.state.service
    upload = Upload.from_token(service.secret, "multipart", upload_id, file_id)
    if upload.key_id != key_id:
        raise ServiceError(403, "The upload belongs to another key")
    return upload


SignedFile = Annotated[Upload, Depends(_signed_file)]
"""A route's parameter: the upload of a whole file that a signed URL allows."""
SignedParts = Annotated[Upload, Depends(_signed_parts)]
"""A route's parameter: the upload in parts that a signed URL allows."""
OwnParts = Annotated[Upload, Depends(_own_parts)]
"""A route's parameter: the caller's own upload in parts."""
