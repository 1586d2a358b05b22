"""The page at /: static files of the package, which load nothing from other hosts."""

import hashlib
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..auth.callers import KeyId
from ..components import CurrentService
from ..http.called_url import root_url
from ..protocol.errors import ServiceError
from ..protocol.responses import Json
from ..queue.last_clips import last_clips

FOLDER = Path(__file__).parent.parent / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}

router = APIRouter()


@router.get("/page/about.json")
async def about(service: CurrentService) -> Response:
    """Returns what the page cannot know by itself."""
    settings = service.settings
    known = {
        "endpoints": [
            {
                "name": name,
                "runners": [{"name": each.name, "state": each.state} for each in endpoint.runner.runners],
                "frames": endpoint.frames,
                "needed_keyframes": endpoint.needed_keyframes,
                "weights": list(settings.weights.get(name, ())),
            }
            for name, endpoint in service.endpoints.items()
        ],
        "tls_port": settings.tls_port,
        "clip_pixels": settings.clip_pixels if settings.extensions else None,
    }
    return Json(known, headers={"Cache-Control": "no-cache"})


@router.get("/page/clips.json")
async def clips(service: CurrentService, key_id: KeyId, request: Request) -> Response:
    """Returns the last clips of the caller's key."""
    made = await last_clips(service, key_id, root_url(service.settings, request))
    return Json({"clips": made}, headers={"Cache-Control": "no-store"})


@router.get("/")
@router.get("/page/{name}")
async def page(service: CurrentService, request: Request, name: str = "index.html") -> Response:
    """Returns a file of the page."""
    content = FILES.get(name)
    if content is None:
        raise ServiceError(404, f"Path {request.scope['path']} not found")
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(service.settings.public_url),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])


def _policy(public_url: str | None) -> str:
    """Returns the content security policy. It allows the public URL of uploads and clips on any origin of the page."""
    own = "'self'"
    if public_url:
        parts = urlsplit(public_url)
        own += f" {parts.scheme}://{parts.netloc}"
    media = f"connect-src {own}; img-src {own} blob: data:; media-src {own} blob:"
    return f"default-src 'self'; {media}; frame-ancestors 'none'"
