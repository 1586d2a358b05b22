"""Tokens with which a browser may stream for a minute or two without knowing a key."""

import math
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..answers import Json
from ..context import Service
from ..errors import ServiceError, infrastructure_error
from ..tokens import make_token, read_token
from ..uploads import read_object
from .storage import check_key

SECONDS, MOST_SECONDS = 120.0, 3600.0

router = APIRouter()


@router.post("/tokens")
async def token(request: Request) -> Response:
    """A token of the caller's key for some apps, which are named without their owner."""
    service: Service = request.app.state.service
    key_id = await service.authenticate(request)
    about: dict[str, Any] = await read_object(service, request)
    apps, seconds = about.get("allowed_apps"), about.get("token_expiration", SECONDS)
    if not isinstance(apps, list) or not all(isinstance(app, str) for app in apps):
        raise infrastructure_error("bad_request", "allowed_apps: give a list of names")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise infrastructure_error("bad_request", "token_expiration: give seconds above 0")
    endpoint = service.settings.endpoint
    claims = {"key_id": key_id, "own": endpoint in apps or endpoint.partition("/")[2] in apps}
    return Json(make_token(service.secret, "app", claims, time.time() + min(seconds, MOST_SECONDS)))


async def caller(request: Request) -> str:
    """The id of the caller's key, which a token in the query may stand for.

    Raises:
        ServiceError: 401, or 403 where the token is for other apps.
    """
    service: Service = request.app.state.service
    given = request.query_params.get("fal_jwt_token")
    if given is None:
        return await service.authenticate(request)
    claims = read_token(service.secret, "app", given, time.time())
    await check_key(service, claims["key_id"], 401)
    if not claims["own"]:
        raise ServiceError(403, "The token is for other apps")
    return str(claims["key_id"])
