"""Uploads with fal's Python client, and with the requests of its JavaScript client (fal-protocol: 7.2)."""

import asyncio
import random
from pathlib import Path

import fal_client
import httpx
import pytest
from fakes.storage_server import StorageService
from fal_client import client as fal_module

from .conftest import DAY, PARTS, initiated, part_url, row_of


@pytest.fixture
def python_client(base: str, key: str, monkeypatch: pytest.MonkeyPatch) -> fal_client.SyncClient:
    monkeypatch.setattr(fal_module, "REST_URL", base)
    monkeypatch.setattr(fal_module, "CDN_URL", base)
    return fal_client.SyncClient(key=key)


def test_python_uploads(python_client: fal_client.SyncClient, service: StorageService, tmp_path: Path) -> None:
    from PIL import Image

    url = python_client.upload(b"one", "image/png", "keyframe one.png")
    assert url.endswith("/keyframe_one.png")
    assert httpx.get(url).content == b"one"
    assert python_client.upload("text", "text/plain").endswith("/file.txt")
    picture = python_client.upload_image(Image.new("RGB", (8, 8), "red"))
    assert httpx.get(picture).headers["Content-Type"] == "image/jpeg"
    path = tmp_path / "drawing.webp"
    path.write_bytes(b"three")
    answer = httpx.get(python_client.upload_file(path))
    assert (answer.content, answer.headers["Content-Type"]) == (b"three", "image/webp")
    assert service.temporary() == []


def test_python_lifecycle(python_client: fal_client.SyncClient, service: StorageService) -> None:
    for expires, seconds in [("1h", 3600), ("immediate", 60), (12, 12), ("never", 7 * DAY), ("1y", 365 * DAY)]:
        settings = fal_client.StorageSettings(expires_in=expires)
        for repository in ("fal_v3", "fal"):
            url = python_client.upload(b"x", "image/png", lifecycle=settings, repository=repository)
            row = row_of(service, url)
            assert row.expires_at == pytest.approx(row.created_at + seconds)


def test_python_second_choice(python_client: fal_client.SyncClient) -> None:
    url = python_client.upload(b"gcs", "image/png", "a.png", repository="fal")
    assert httpx.get(url).content == b"gcs"


def test_python_multipart(
    python_client: fal_client.SyncClient, service: StorageService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fal_module, "MULTIPART_THRESHOLD", 4000)
    monkeypatch.setattr(fal_module, "MULTIPART_CHUNK_SIZE", 700)
    content = random.Random(1).randbytes(9_999)
    path = tmp_path / "big.png"
    path.write_bytes(content)
    for url in (python_client.upload(content, "image/png"), python_client.upload_file(path)):
        answer = httpx.get(url)
        assert answer.content == content
        assert answer.headers["Content-Type"] == "image/png"
    assert [name.name for name in (service.settings.data / "files" / "parts").iterdir()] == []


def test_python_async(python_client: fal_client.SyncClient, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fal_module, "MULTIPART_THRESHOLD", 4000)
    monkeypatch.setattr(fal_module, "MULTIPART_CHUNK_SIZE", 1500)

    async def run() -> list[str]:
        client = fal_client.AsyncClient(key=key)
        big = await client.upload(b"x" * 9000, "image/png", "big.png")
        return [big, await client.upload(b"x" * 9, "image/png", repository="fal")]

    assert [len(httpx.get(url).content) for url in asyncio.run(run())] == [9000, 9]


def test_javascript_upload(http: httpx.Client, key: str, service: StorageService) -> None:
    lifecycle = {"X-Fal-Object-Lifecycle": '{"expiration_duration_seconds":60,"initial_acl":{"default":"hide"}}'}
    urls = initiated(http, key, **lifecycle)
    assert http.get(urls["file_url"]).status_code == 404
    answer = http.put(urls["upload_url"], content=b"blob", headers={"Content-Type": "image/jpeg"})
    assert answer.status_code == 200
    found = http.get(urls["file_url"])
    assert (found.content, found.headers["Content-Type"]) == (b"blob", "image/png")
    assert answer.headers["ETag"] == found.headers["ETag"]
    row = row_of(service, urls["file_url"])
    assert row.expires_at == pytest.approx(row.created_at + 60)


def test_javascript_multipart(http: httpx.Client, key: str) -> None:
    urls = initiated(http, key, multipart=True)
    parts = [http.put(part_url(urls["upload_url"], n + 1), content=part).json() for n, part in enumerate(PARTS)]
    assert [part["partNumber"] for part in parts] == [1, 2, 3, 4]
    answer = http.post(part_url(urls["upload_url"], "complete"), json={"parts": parts})
    assert answer.status_code == 200
    assert http.get(urls["file_url"]).content == b"".join(PARTS)


def test_an_upload_may_be_repeated(http: httpx.Client, key: str, service: StorageService) -> None:
    urls = initiated(http, key)
    etags = [http.put(urls["upload_url"], content=body).headers["ETag"] for body in (b"first", b"second")]
    answer = http.get(urls["file_url"])
    assert (answer.content, answer.headers["ETag"]) == (b"second", etags[1])
    assert etags[0] != etags[1]
    assert len(list((service.settings.data / "files" / "objects").iterdir())) == 1
