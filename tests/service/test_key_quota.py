"""The bytes that are stored for a key are bounded: its uploads and their parts, its clips, and the inputs that wait."""

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fakes.storage_server import StorageService, served, storage_app
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.objects.stored_files import keep_file, remove_expired_files
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import FileRow, NewRequest, QuotaExceeded, SqlStore

from .conftest import APP
from .waiting import SECONDS

KIB = 1024
FILE = 64 * KIB  # counts for each file besides its bytes
PART = b"p" * 100_000
QUOTA = 3 * (len(PART) + FILE)


@pytest.fixture
def service(tmp_path: Path) -> StorageService:
    return StorageService(tmp_path / "data", key_bytes=QUOTA)


@pytest.fixture
def http(service: StorageService) -> Iterator[httpx.Client]:
    app = storage_app()
    app.state.service = service
    with served(app) as base, httpx.Client(base_url=base, headers=of_key(service)) as client:
        yield client


def of_key(service: StorageService) -> dict[str, str]:
    return {"Authorization": f"Key {service.new_key()}"}


def upload(http: httpx.Client, body: Any = PART, headers: dict[str, str] | None = None) -> httpx.Response:
    return http.post("/files/upload", content=body, headers=headers)


def test_uploads_of_a_key_are_bounded_together(http: httpx.Client, service: StorageService) -> None:
    lasting = {"X-Fal-Object-Lifecycle": '{"expiration_duration_seconds": 1000}'}
    for headers in ({}, lasting, lasting):
        upload(http, headers=headers).raise_for_status()
    for body in (b"", iter([PART]), PART):  # with and without a Content-Length
        refused = upload(http, body)
        assert (refused.status_code, refused.json()["error_type"]) == (507, "quota_exceeded")
        told = refused.json()["detail"]
        assert str(QUOTA) in told and "\n" not in told
    assert service.temporary() == []
    assert len(list((service.settings.data / "files/objects").iterdir())) == 3
    upload(http, headers=of_key(service)).raise_for_status()  # another key has its own
    remove_expired_files(service, time.time() + 2000)
    upload(http).raise_for_status()
    upload(http).raise_for_status()
    assert upload(http).status_code == 507  # the first file stays for a week


def test_a_body_that_cannot_fit_is_refused_before_it_arrives(http: httpx.Client) -> None:
    head = f"POST /files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['Authorization']}\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=SECONDS) as sock:
        sock.sendall(f"{head}Content-Length: {QUOTA}\r\n\r\n".encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 507 ")


def test_parts_count_and_their_file_replaces_them(http: httpx.Client) -> None:
    begun = http.post("/files/upload/multipart").raise_for_status().json()
    path = f"{urlsplit(begun['access_url']).path}/multipart/{begun['uploadId']}"
    parts = []
    for number in (1, 2, 3):
        answer = http.put(f"{path}/{number}", content=PART).raise_for_status()
        parts.append({"partNumber": number, "etag": answer.headers["etag"]})
    assert http.put(f"{path}/4", content=PART).status_code == 507
    assert upload(http).status_code == 507
    http.post(f"{path}/complete", json={"parts": parts}).raise_for_status()
    assert http.get(begun["access_url"]).content == 3 * PART
    upload(http, PART[:1000]).raise_for_status()  # one file instead of three
    assert upload(http).status_code == 507


def test_a_clip_is_stored_in_any_case(service: StorageService) -> None:
    """Its request was accepted. It counts for the next ones."""
    for _ in range(4):
        keep_file(service, PART, key_id="k", name="a.mp4", content_type="video/mp4", seconds=None)
    with pytest.raises(QuotaExceeded):
        service.store.check_room("k", 0, QUOTA)


def test_a_failed_upload_counts_no_longer(
    http: httpx.Client, service: StorageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(service.files, "put", full)
        for _ in range(4):
            assert upload(http).json()["error_type"] == "internal_error"
    for _ in range(3):
        upload(http).raise_for_status()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_uploads_at_once_do_not_exceed_it(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """Each thread is a server of its own on PostgreSQL."""
    shared = kind == "postgresql"
    url = request.getfixturevalue("database") if shared else f"sqlite:///{tmp_path / 'a.sqlite3'}"
    stores = [SqlStore(url) for _ in range(4 if shared else 1)]
    key = f"key {time.monotonic_ns()}"
    together = threading.Barrier(8)

    def add(number: int) -> bool:
        together.wait()
        row = FileRow(f"{key[4:]}-{number}", key, "a", "a/b", len(PART), "o", 1.0, None)
        try:
            stores[number % len(stores)].add_file(row, key_bytes=QUOTA)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(add, range(8))) == 3
    request_of = dataclasses.replace(NewRequest("r", key, APP, {"prompt": "a"}, 1.0, "http://x"), id=key)
    with pytest.raises(QuotaExceeded):
        stores[0].submit(request_of, limit=10**6, key_limit=9, key_bytes=QUOTA)
    for store in stores:
        store.close()


def test_inputs_count_until_their_requests_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = Settings(tmp_path / "data", pipeline="stub_pipeline:load", anonymous=True, key_bytes=QUOTA)
        service = open_service(settings)
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            given = {"prompt": "a", "keyframe_0_image_url": "data:," + "x" * (QUOTA // 3)}
            ids = [(await client.post(f"/queue/{APP}", json=given)).json()["request_id"] for _ in range(2)]
            refused = await client.post(f"/queue/{APP}", json=given)
            assert (refused.status_code, refused.json()["error_type"]) == (507, "quota_exceeded")
            assert (await client.post(f"/queue/{APP}", json={"prompt": "a"})).status_code == 200
            assert (await client.post("/files/upload", content=b"x" * (QUOTA // 3))).status_code == 507
            (await client.put(f"/queue/{APP}/requests/{ids[0]}/cancel")).raise_for_status()
            assert (await client.post(f"/queue/{APP}", json=given)).status_code == 200
        service.store.close()

    asyncio.run(scenario())
