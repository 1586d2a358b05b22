"""What those who run the service look at, and what its callers may know of it."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..answers import Json
from ..context import Service
from ..errors import ServiceError
from ..openapi import queue_document

router = APIRouter()


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers."""
    return Json({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """A model is loaded, and requests are taken."""
    service: Service = request.app.state.service
    if service.draining:
        return Json({"status": "draining"}, 503)
    if not service.runner.ready:
        problem = service.runner.problem
        return Json({"status": "failed", "problem": problem} if problem else {"status": "loading"}, 503)
    told = {name: value for name, value in service.runner.about.items() if name not in ("bundle", "pid")}
    return Json({"status": "ready", **told})  # everybody may ask: no path, no process


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/.well-known/jwks.json")
async def jwks(request: Request) -> Response:
    """The keys that webhooks are signed with."""
    service: Service = request.app.state.service
    return Json(service.signer.jwks(), headers={"Cache-Control": "public, max-age=3600"})


@router.get("/api/openapi/queue/openapi.json")
@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The endpoint as fal publishes it."""
    service: Service = request.app.state.service
    endpoint = service.settings.endpoint
    asked = request.query_params.get("endpoint_id", endpoint)
    if asked != endpoint:
        raise ServiceError(404, f"Endpoint {asked[:200]!r} not found; this server has {endpoint}")
    return Json(queue_document(endpoint, service.root_url(request)))
