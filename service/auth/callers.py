"""Identifies the caller by the key or token in headers or query. Routes take the result as a dependency."""

import hashlib
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from .. import clock
from ..components import CurrentEndpoint, Service
from ..protocol.errors import ServiceError
from .api_keys import ANONYMOUS
from .signed_tokens import read_token


def remembered_key_id(service: Service, authorization: str | None) -> str | None:
    """Returns the id of the key in an Authorization header if memory has it, without asking the store."""
    credentials = _credentials(authorization)
    if credentials is None:
        return ANONYMOUS if service.settings.anonymous and not authorization else None
    return service.keyring.remembered(credentials)


async def require_valid_key(service: Service, key_id: str, status: int) -> None:
    """Checks the key that a token was made for: no token outlives its key.

    Raises:
        ServiceError: with `status`, if the key is unknown or revoked.
    """
    if key_id == ANONYMOUS and service.settings.anonymous:
        return
    row = await service.store.read(service.store.get_key, key_id)
    if row is None or row.revoked_at is not None:
        raise ServiceError(status, "The key that this token was made for is no longer valid")


def user_id(key_id: str) -> str:
    """Returns the user id that webhooks send. It reveals nothing about the key."""
    return hashlib.sha256(f"user {key_id}".encode()).hexdigest()[:24]


async def _key_of_header(request: Request) -> str:
    """Returns the id of the key in the Authorization header, or raises ServiceError 401."""
    service: Service = request.app.state.service
    authorization = request.headers.get("Authorization")
    key_id = remembered_key_id(service, authorization)
    credentials = _credentials(authorization)
    if key_id is None and credentials is not None:
        key_id = await service.store.read(service.keyring.check, credentials)
    if key_id is None:
        detail = "invalid key credentials" if authorization else "no key was given"
        raise ServiceError(401, detail, headers={"WWW-Authenticate": "Key"})
    return key_id


async def _key_of_stream(request: Request, endpoint: CurrentEndpoint) -> str:
    """Returns the id of the key in the header, or of the key that a token in the query was made for.

    Raises:
        ServiceError: 401, or 403 if the token is for other apps.
    """
    service: Service = request.app.state.service
    token = request.query_params.get("fal_jwt_token")
    if token is None:
        return await _key_of_header(request)
    claims = read_token(service.secret, "app", token, clock.now())
    await require_valid_key(service, claims["key_id"], 401)
    if not {endpoint.name, endpoint.name.partition("/")[2]} & set(claims.get("apps", ())):
        raise ServiceError(403, "The token is for other apps")
    return str(claims["key_id"])


async def _key_of_uploader(request: Request) -> str:
    """Returns the id of the key that a storage token was made for. A key itself, which has a colon, works too."""
    service: Service = request.app.state.service
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or ":" in token:
        return await _key_of_header(request)
    claims = read_token(service.secret, "bearer", token.strip(), clock.now())
    await require_valid_key(service, claims["key_id"], 401)
    return str(claims["key_id"])


def _credentials(authorization: str | None) -> str | None:
    """Returns what follows the scheme of an Authorization header: Key, or Bearer as curl and others write it."""
    scheme, _, credentials = (authorization or "").partition(" ")
    return credentials.strip() or None if scheme.lower() in ("key", "bearer") else None


KeyId = Annotated[str, Depends(_key_of_header)]
"""A route's parameter: the id of the caller's API key."""
StreamKeyId = Annotated[str, Depends(_key_of_stream)]
"""The same for streams, which also take a token in the query."""
UploaderKeyId = Annotated[str, Depends(_key_of_uploader)]
"""The same for uploads, which also take a storage token."""
