"""Documents for callers: the OpenAPI document, and the keys that verify webhooks."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...runtime.errors import shown
from ..components import CurrentService
from ..http.called_url import root_url
from ..protocol.endpoint_input import input_model
from ..protocol.errors import ServiceError
from ..protocol.openapi_document import queue_document
from ..protocol.responses import Json

router = APIRouter()


@router.get("/.well-known/jwks.json")
async def jwks(service: CurrentService) -> Response:
    """Returns the public keys that verify the signatures of webhooks."""
    return Json(service.signer.jwks(), headers={"Cache-Control": "public, max-age=3600"})


@router.get("/api/openapi/queue/openapi.json")
@router.get("/openapi.json")
async def openapi(service: CurrentService, request: Request) -> Response:
    """Returns the OpenAPI document of an endpoint, as fal publishes it: of `endpoint_id`, or of the first one."""
    asked = request.query_params.get("endpoint_id", next(iter(service.endpoints)))
    if asked not in service.endpoints:
        raise ServiceError(404, f"Endpoint {shown(asked)} not found; this server has {', '.join(service.endpoints)}")
    given = input_model(service.endpoints[asked].frames, service.settings.extensions)
    return Json(queue_document(asked, root_url(service.settings, request), given))
