"""The ASGI application of a service: its routes, its error responses, and the middlewares in their order."""

import logging
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from ..runtime.errors import shown
from .components import Service
from .http.middleware.access_log import AccessLog
from .http.middleware.cors import CorsHeaders, Preflight
from .http.middleware.proxy_target import ProxyTarget
from .http.middleware.request_id import RequestId
from .http.middleware.request_path import RequestPath
from .http.middleware.status_polls import StatusPolls
from .http.middleware.unexpected_errors import UnexpectedErrors
from .objects.object_stores import FilesUnavailable
from .protocol.errors import ServiceError, store_unavailable
from .protocol.responses import Json
from .routes import api_docs, files, monitoring, new_requests, page, proxy, public_documents, requests, tokens, uploads
from .settings import TAKEN
from .store import STORE_FAILURES

log = logging.getLogger("sparsectrl_lcm.service.http")


def create_app(service: Service) -> FastAPI:
    """Creates the application of an open service.

    Raises:
        InvalidRequest: the settings ask for Swagger UI, whose package is missing.
    """
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            ServiceError: _service_error,
            HTTPException: _http_error,
            **dict.fromkeys(STORE_FAILURES, _store_failure),
            FilesUnavailable: _files_unavailable,
        },
        middleware=[  # outermost first
            Middleware(RequestPath),
            Middleware(ProxyTarget),
            Middleware(RequestId, endpoints=service.endpoints),
            Middleware(CorsHeaders),
            Middleware(UnexpectedErrors),
            Middleware(StatusPolls, service=service),
            Middleware(AccessLog),
            Middleware(Preflight),
        ],
    )
    app.state.service = service
    for name in service.endpoints:
        for routes in (new_requests, requests):
            app.include_router(routes.make_router(name))
    if service.settings.docs:
        app.include_router(api_docs.make_router(service.endpoints))
    for module in (monitoring, public_documents, uploads, tokens, files, page, proxy):
        app.include_router(module.router)
    return app


async def _service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return Json(error.body, error.status, error.headers)


async def _store_failure(request: Request, _: Exception) -> Response:
    return await _service_error(request, store_unavailable())


async def _files_unavailable(request: Request, error: Exception) -> Response:
    log.warning("the object store failed: %s", error)
    return await _service_error(request, store_unavailable("object store"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail: Any = error.detail
    if error.status_code == 404:
        detail = _not_found(request)
    return Json({"detail": detail}, error.status_code, dict(error.headers or {}))


def _not_found(request: Request) -> str:
    """Says that there is no such path.

    A POST to an unknown endpoint, and any call for a request of one, are told the names of those of this server.
    """
    path = request.scope["path"]  # `request.url` takes only UTF-8
    endpoints = request.app.state.service.endpoints
    _, owner, *rest = path.split("/")
    name = "/".join([owner, *rest[:1]])
    called = request.method == "POST" or rest[1:2] == ["requests"]
    if not called or not rest or owner in TAKEN or name in endpoints:
        return f"Path {path} not found"
    return f"Endpoint {shown(name)} not found; this server has {', '.join(endpoints)}"
