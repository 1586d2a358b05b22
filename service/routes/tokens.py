"""Tokens that let a browser stream for a limited time without knowing a key."""

import math
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .. import clock
from ..auth.callers import KeyId
from ..auth.signed_tokens import MAX_LENGTH, make_token
from ..components import CurrentService
from ..http.request_bodies import read_object
from ..protocol.errors import infrastructure_error
from ..protocol.responses import Json

SECONDS, MOST_SECONDS = 120.0, 3600.0
"""Lifetime of a token in seconds: default and maximum."""

router = APIRouter()


@router.post("/tokens")
async def token(service: CurrentService, key_id: KeyId, request: Request) -> Response:
    """Returns a token of the caller's key for the named apps, of this server or of others with the same database.

    A name may have its owner in front or not.
    """
    body: dict[str, Any] = await read_object(service, request)
    apps, seconds = body.get("allowed_apps"), body.get("token_expiration", SECONDS)
    if not isinstance(apps, list) or not all(isinstance(app, str) for app in apps):
        raise infrastructure_error("bad_request", "allowed_apps: give a list of names")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise infrastructure_error("bad_request", "token_expiration: give seconds above 0")
    claims = {"key_id": key_id, "apps": apps}
    signed = make_token(service.secret, "app", claims, clock.now() + min(seconds, MOST_SECONDS))
    if len(signed) > MAX_LENGTH:
        raise infrastructure_error("bad_request", "allowed_apps: too long for a token; give fewer or shorter names")
    return Json(signed)
