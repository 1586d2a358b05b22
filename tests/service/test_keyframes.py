"""Keyframe URLs of every kind, and the errors for those that cannot be downloaded."""

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx
import pytest
from fakes.storage_server import StorageService
from PIL import Image
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.network import keyframe_urls as keyframes
from sparsectrl_lcm.service.network.downloads import FetchError, FetchTooLarge
from sparsectrl_lcm.service.network.keyframe_urls import save_keyframe
from sparsectrl_lcm.service.objects.stored_files import file_url, keep_file
from sparsectrl_lcm.service.protocol.errors import ServiceError

from .conftest import APP, Server, started

FIELD = "keyframe_0_image_url"
BASE = "https://api.example.com:8443/fal"


@pytest.fixture
def service(tmp_path: Path) -> StorageService:
    return StorageService(tmp_path, image_bytes=1000, public_url="https://public.example.com")


def get(service: StorageService, url: str, bases: tuple[str, ...] = (BASE,)) -> bytes:
    file = io.BytesIO()
    asyncio.run(save_keyframe(service, url, file, FIELD, bases))
    return file.getvalue()


def refused(service: StorageService, url: str, bases: tuple[str, ...] = (BASE,)) -> dict[str, Any]:
    with pytest.raises(ServiceError) as raised:
        get(service, url, bases)
    assert raised.value.status == 422
    (detail,) = raised.value.body["detail"]
    assert detail["loc"] == ["body", FIELD]
    assert detail["url"].endswith(f"#{detail['type']}")
    return detail


@pytest.fixture
def never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(url: str, *_: Any, **__: Any) -> None:
        raise AssertionError(url)

    monkeypatch.setattr(keyframes, "fetch", fetch)


@pytest.mark.parametrize(
    ("url", "expected"),  # RFC 2397, and WHATWG's fetch for the behaviour of browsers
    [
        ("data:image/png;base64,AAEC/w==", b"\0\1\2\xff"),
        ("data:image/png;base64,AAEC/w", b"\0\1\2\xff"),
        ("DATA:image/png;BASE64,AAEC/w==", b"\0\1\2\xff"),
        ("data:image/png;charset=utf-8;base64,AAEC%2Fw%3D%3D", b"\0\1\2\xff"),
        ("data:image/png;base64,AAEC\n /w==", b"\0\1\2\xff"),
        ("data:;base64,QQ==", b"A"),
        ("data:,A%20brief%20note", b"A brief note"),
        ("data:image/svg+xml,%3Csvg%3E", b"<svg>"),
        ("data:image/png,%ff%00", b"\xff\0"),
        ("data:,", b""),
    ],
)
def test_data_uris(service: StorageService, url: str, expected: bytes) -> None:
    assert get(service, url) == expected


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,A", "data:;base64,A*==", "data:;base64,é"]
)
def test_data_uris_that_are_damaged(service: StorageService, url: str) -> None:
    detail = refused(service, url)
    assert (detail["type"], "damaged" in detail["msg"]) == ("file_download_error", True)


def test_data_uris_are_bounded(service: StorageService) -> None:
    at_most = 10 * 2**20
    longest = "data:;base64," + "A" * (at_most - len("data:;base64,") + 1)
    assert refused(service, longest)["ctx"] == {"max_size": at_most}
    detail = refused(service, "data:;base64," + base64.b64encode(b"x" * 1001).decode())
    assert (detail["type"], detail["ctx"]) == ("file_too_large", {"max_size": 1000})
    assert get(service, "data:;base64," + base64.b64encode(b"x" * 1000).decode()) == b"x" * 1000


@pytest.mark.usefixtures("never_fetched")
def test_own_files(service: StorageService) -> None:
    row = keep_file(service, b"own", key_id="k", name="スケッチ.png", content_type="image/png", seconds=60)
    name = quote(row.name)
    for url in (
        file_url(BASE, row),
        file_url("http://api.example.com:8443/fal", row),  # TLS may end in front of the server
        file_url("https://API.example.COM:8443/fal", row),
        f"{BASE}/files/{row.id}/{row.name}",
        f"{BASE}/files/{row.id}/{name}?download=1#x",
        file_url("https://public.example.com", row),
        file_url("http://public.example.com:80", row),
        file_url("https://public.example.com:443", row),
        file_url("http://127.0.0.1:8000", row),  # another port or name of the server, or fal's, which can lead here
        file_url("http://localhost:8443/queue", row),
        file_url("https://v3.fal.media", row),
    ):
        assert get(service, url) == b"own", url


@pytest.mark.usefixtures("never_fetched")
def test_own_files_that_are_not_there(service: StorageService, monkeypatch: pytest.MonkeyPatch) -> None:
    row = keep_file(service, b"own", key_id="k", name="a.png", content_type="image/png", seconds=60)
    for path in (
        f"{row.id}/b.png",
        "x/a.png",
        f"{row.id}.1/a.png",
        f"../{row.id}/a.png",
        "",
        row.id,
        f"{row.id}/a.png/x",
    ):
        assert "no such file" in refused(service, f"{BASE}/files/{path}")["msg"]
    monkeypatch.setattr(clock, "now", lambda: row.created_at + 61)
    assert "no such file" in refused(service, file_url(BASE, row))["msg"]
    assert "expired" in refused(service, file_url("https://v3.fal.media", row))["msg"]
    monkeypatch.undo()
    service.files.delete(row.object_name)
    assert "no such file" in refused(service, file_url(BASE, row))["msg"]


def test_own_files_are_bounded(service: StorageService) -> None:
    row = keep_file(service, b"x" * 1001, key_id="k", name="a.png", content_type="image/png", seconds=60)
    detail = refused(service, file_url(BASE, row))
    assert (detail["type"], detail["ctx"]) == ("file_too_large", {"max_size": 1000})


def test_other_urls_are_downloaded(service: StorageService, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    async def fetch(url: str, file: BinaryIO, **options: Any) -> None:
        asked.append((url, options))
        file.write(b"fetched")

    monkeypatch.setattr(keyframes, "fetch", fetch)
    row = keep_file(service, b"own", key_id="k", name="a.png", content_type="image/png", seconds=60)
    urls = [
        f"https://v3.fal.media/files/{row.id[:-1]}-/a.png",
        f"https://example.com/files/{row.id}.1/a.png",
        f"https://example.com/file/{row.id}/a.png",
        f"https://example.com/?/files/{row.id}/a.png",
        f"{BASE}/other",
        f"ftp://api.example.com:8443/fal/files/{row.id}/a.png",
    ]
    for url in urls:
        assert get(service, url) == b"fetched"
    assert [url for url, _ in asked] == urls
    assert asked[0][1] == {"limit_bytes": 1000, "seconds": 20.0, "redirects": 3, "allow": ()}


def test_errors_of_downloads(service: StorageService, monkeypatch: pytest.MonkeyPatch) -> None:
    error: FetchError = FetchError("its host cannot be reached, or is not public", "10.0.0.7: connection refused")

    async def fetch(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(keyframes, "fetch", fetch)
    detail = refused(service, "http://inside.example.com/x.png")
    assert detail["type"] == "file_download_error"
    assert "10.0.0.7" not in str(detail)
    assert detail["input"] == "http://inside.example.com/x.png"
    error = FetchTooLarge("large")
    detail = refused(service, "http://large.example.com/x.png")
    assert (detail["type"], detail["ctx"]) == ("file_too_large", {"max_size": 1000})


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:1/", "http://2130706433/", "http://[::1]/", "http://[::1", "http://169.254.169.254/", ""),
        *("file:///etc/passwd", "/etc/passwd", "x.png", "http://user:pass@example.com/", "javascript:alert(1)"),
        *("http://a:99999/", "https://x/" + "y" * 2048),
    ],
)
def test_urls_that_lead_nowhere(service: StorageService, url: str) -> None:
    assert refused(service, url)["type"] == "file_download_error"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with default settings, which reaches no private address."""
    yield from started(tmp_path_factory.mktemp("strict"), pipeline="stub_pipeline:load", allow_private=[])


@pytest.mark.parametrize(
    "base", ["{url}", "{url}/queue", "http://localhost:{port}", "http://127.0.0.1:{queue_port}", "https://v3.fal.media"]
)
def test_an_uploaded_file_is_found_under_every_name_of_the_server(strict: Server, base: str) -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(image, "PNG")
    with httpx.Client(headers=strict.headers(), timeout=30) as client:
        sent = {"Content-Type": "image/png", "X-Fal-File-Name": "a.png"}
        uploaded = client.post(f"{strict.url}/files/upload", content=image.getvalue(), headers=sent).json()["url"]
        shown = base.format(url=strict.url, port=strict.port, queue_port=strict.queue_port)
        given = {"prompt": "a", "keyframe_0_image_url": uploaded.replace(strict.url, shown)}
        assert client.post(f"{strict.url}/{APP}", json=given).status_code == 200, strict.log
        private = {"prompt": "a", "keyframe_0_image_url": f"{strict.url}/healthz"}
        answer = client.post(f"{strict.url}/{APP}", json=private)
        assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "file_download_error")
