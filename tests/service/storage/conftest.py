"""A real server with the routes of files and uploads, which the tests of this folder share."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fakes.storage_server import StorageService, served, storage_app
from fastapi import FastAPI
from sparsectrl_lcm.service.store import FileRow

DAY = 86_400
PARTS = [b"a" * 3000, b"b" * 2000, b"c" * 4000, b"d" * 1]


@pytest.fixture(scope="package")
def running() -> Iterator[tuple[FastAPI, str]]:
    app = storage_app()
    with served(app) as base:
        yield app, base


@pytest.fixture
def service(running: tuple[FastAPI, str], tmp_path: Path) -> StorageService:
    made = StorageService(tmp_path / "data", upload_bytes=10_000, part_bytes=5_000, object_seconds=7.0 * DAY)
    running[0].state.service = made
    return made


@pytest.fixture(scope="package")
def base(running: tuple[FastAPI, str]) -> str:
    return running[1]


@pytest.fixture
def key(service: StorageService) -> str:
    return service.new_key()


@pytest.fixture(scope="package")
def http(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base) as client:
        yield client


def as_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Key {key}"}


def token_of(http: httpx.Client, key: str) -> dict[str, str]:
    answer = http.post("/storage/auth/token?storage_type=fal-cdn-v3", headers=as_key(key), json={})
    assert answer.status_code == 200
    return {"Authorization": f"Bearer {answer.json()['token']}"}


def uploaded(http: httpx.Client, key: str, body: bytes = b"bytes", name: str = "a.png", **headers: str) -> str:
    sent = token_of(http, key) | {"Content-Type": "image/png", "X-Fal-File-Name": name.encode()} | headers
    answer = http.post("/files/upload", content=body, headers=sent)
    assert answer.status_code == 200, answer.text
    return answer.json()["access_url"]


def row_of(service: StorageService, url: str) -> FileRow:
    row = service.store.get_file(urlsplit(url).path.split("/")[2])
    assert row is not None
    return row


def initiated(http: httpx.Client, key: str, multipart: bool = False, **headers: str) -> dict[str, str]:
    path = "/storage/upload/initiate-multipart" if multipart else "/storage/upload/initiate"
    about = {"content_type": "image/png", "file_name": "blob.png"}
    answer = http.post(f"{path}?storage_type=fal-cdn-v3", json=about, headers=as_key(key) | headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def part_url(upload_url: str, last: object) -> str:
    url = urlsplit(upload_url)
    return f"{url.scheme}://{url.netloc}{url.path}/{last}?{url.query}"


def started(http: httpx.Client, key: str) -> tuple[str, dict[str, str]]:
    headers = token_of(http, key) | {"Content-Type": "image/png", "X-Fal-File-Name": "big.png"}
    answer = http.post("/files/upload/multipart", headers=headers).json()
    return f"{answer['access_url']}/multipart/{answer['uploadId']}", token_of(http, key)


def sent_parts(http: httpx.Client, url: str, headers: dict[str, str], parts: list[bytes]) -> list[dict[str, Any]]:
    def send(number: int) -> dict[str, Any]:
        answer = http.put(f"{url}/{number}", content=parts[number - 1], headers=headers)
        assert answer.status_code == 200, answer.text
        return {"partNumber": number, "etag": answer.headers["ETag"]}

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(send, reversed(range(1, len(parts) + 1))))
