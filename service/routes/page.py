"""The page at /: plain files of the package, which load nothing from elsewhere."""

import hashlib
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..answers import Json
from ..context import Service
from ..errors import ServiceError

FOLDER = Path(__file__).parent.parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

router = APIRouter()


@router.get("/page/about.json")
async def about(request: Request) -> Response:
    """What the page cannot know by itself."""
    service: Service = request.app.state.service
    return Json({"tls_port": service.settings.tls_port}, headers={"Cache-Control": "no-cache"})


@router.get("/")
@router.get("/page/{name}")
async def page(request: Request, name: str = "index.html") -> Response:
    """A file of the page."""
    content = FILES.get(name)
    if content is None:
        raise ServiceError(404, f"Path {request.url.path} not found")
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(request.app.state.service.settings.public_url),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])


def _policy(public_url: str | None) -> str:
    """Uploads and clips have the URL that is given out, wherever the page itself was opened."""
    there = "'self'"
    if public_url:
        parts = urlsplit(public_url)
        there += f" {parts.scheme}://{parts.netloc}"
    media = f"connect-src {there}; img-src {there} blob: data:; media-src {there} blob:"
    return f"default-src 'self'; {media}; frame-ancestors 'none'"


FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
