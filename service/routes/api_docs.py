"""Swagger UI at /docs, from the files of the package swagger-ui-bundle: nothing comes from other hosts."""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from ...runtime.errors import InvalidRequest
from ..protocol.errors import ServiceError

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>API</title>
<link rel="icon" href="/page/icon.svg"><link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>
</body>
</html>
"""
_START = """for (const [place, name] of %s.entries()) {
  const section = document.createElement("div");
  section.id = `endpoint-${place}`;
  document.body.append(section);
  const url = `/openapi.json?endpoint_id=${encodeURIComponent(name)}`;
  SwaggerUIBundle({ url, dom_id: `#${section.id}`, validatorUrl: null });
}
"""
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_router(endpoints: Iterable[str]) -> APIRouter:
    """Creates the routes of Swagger UI, which shows the documents of all endpoints one below the other.

    Raises:
        InvalidRequest: its package is missing; the field is `docs`.
    """
    if find_spec("swagger_ui_bundle") is None:
        raise InvalidRequest("docs", "the page needs swagger-ui-bundle", "run: pip install swagger-ui-bundle")
    from swagger_ui_bundle import swagger_ui_path

    files = {"start.js": (_START % json.dumps(list(endpoints))).encode()}
    files |= {name: Path(swagger_ui_path, name).read_bytes() for name in ("swagger-ui.css", "swagger-ui-bundle.js")}
    router = APIRouter(prefix="/docs")

    async def page() -> Response:
        return Response(_PAGE, headers=_HEADERS, media_type="text/html")

    async def file(name: str) -> Response:
        if name not in files:
            raise ServiceError(404, f"Path /docs/{name} not found")
        return Response(files[name], headers=_HEADERS, media_type=_TYPES[Path(name).suffix])

    router.add_api_route("", page, methods=["GET"])
    router.add_api_route("/{name}", file, methods=["GET"])
    return router
