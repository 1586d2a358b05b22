"""Bodies of uploads: sizes, clients that stall or go, full disks, lifetimes."""

import dataclasses
import os
import socket
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fakes.storage_server import StorageService
from sparsectrl_lcm.service.http import request_bodies as uploads
from sparsectrl_lcm.service.objects.stored_files import keep_file, remove_expired_files
from sparsectrl_lcm.service.store import FileRow

from ..waiting import SECONDS, wait_until
from .conftest import DAY, as_key, initiated, row_of, token_of, uploaded


def test_bodies_that_are_too_large(http: httpx.Client, key: str, service: StorageService) -> None:
    headers = token_of(http, key)
    chunks = [b"x" * 1000] * 11
    for content in (b"x" * 10_001, iter(chunks)):
        answer = http.post("/files/upload", content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json() == {
            "detail": "The body is too large; allowed are 10000 bytes",
            "error_type": "file_too_large",
        }
        assert answer.headers["X-Fal-Error-Type"] == "file_too_large"
    assert http.put(initiated(http, key)["upload_url"], content=iter(chunks)).status_code == 413
    assert http.post("/storage/upload/initiate", content=b"x" * 70_000, headers=as_key(key)).status_code == 413
    assert len(http.get(uploaded(http, key, b"x" * 10_000)).content) == 10_000
    assert service.temporary() == []
    assert len(list((service.settings.data / "files" / "objects").iterdir())) == 1


@pytest.fixture
def token(http: httpx.Client, key: str) -> str:
    return token_of(http, key)["Authorization"]


def test_nothing_is_read_of_a_body_that_says_it_is_too_large(token: str, base: str) -> None:
    with raw_upload(token, base, "Content-Length: 99999999999") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def raw_upload(token: str, base: str, framing: str) -> socket.socket:
    url = urlsplit(base)
    connection = socket.create_connection((url.hostname, url.port), timeout=SECONDS)
    head = [
        "POST /files/upload HTTP/1.1",
        f"Host: {url.netloc}",
        f"Authorization: {token}",
    ]
    connection.sendall("\r\n".join([*head, framing, "", ""]).encode())
    return connection


@pytest.fixture
def _impatient(service: StorageService, token: str) -> None:
    """A body has little time, other than that with which the token was asked for."""
    service.settings = dataclasses.replace(service.settings, body_seconds=0.3)


@pytest.mark.usefixtures("_impatient")
def test_bodies_that_stall(token: str, base: str, service: StorageService) -> None:
    with raw_upload(token, base, "Content-Length: 1000") as connection:
        connection.sendall(b"x" * 10)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # the server closes
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"too slowly" in answer
    assert service.temporary() == []


@pytest.mark.usefixtures("_impatient")
def test_bodies_that_drip(token: str, base: str, service: StorageService) -> None:
    """Each chunk arrives in time, but the whole body takes too long."""
    start = time.monotonic()
    with raw_upload(token, base, "Transfer-Encoding: chunked") as connection:
        connection.settimeout(0.02)
        answer = b""
        while not answer and time.monotonic() - start < SECONDS:
            with suppress(OSError):  # the server has answered and closed
                connection.sendall(b"1\r\nx\r\n")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 400")
    assert service.temporary() == []


def test_clients_that_go(token: str, base: str, service: StorageService) -> None:
    connection = raw_upload(token, base, "Content-Length: 1000")
    connection.sendall(b"x" * 10)
    wait_until(lambda: len(service.temporary()) == 1)
    connection.close()
    wait_until(lambda: service.temporary() == [])
    assert list((service.settings.data / "files").glob("objects/*")) == []


def test_memory_is_bounded(
    http: httpx.Client, key: str, service: StorageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.settings = dataclasses.replace(service.settings, upload_bytes=2**30)
    written: list[int] = []
    write = uploads._write

    def counted(file: Any, digest: Any, block: bytes) -> None:
        written.append(len(block))
        write(file, digest, block)

    monkeypatch.setattr(uploads, "_write", counted)
    content = os.urandom(5 * 2**20 + 7)
    assert http.get(uploaded(http, key, content)).content == content
    assert sum(written) == len(content)
    assert max(written) < 2 * uploads.WRITE_BYTES


def test_a_full_disk(http: httpx.Client, key: str, service: StorageService, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = token_of(http, key)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(uploads, "_write", full)
        assert http.post("/files/upload", content=b"x", headers=headers).status_code == 507
    monkeypatch.setattr(service.files, "put", full)
    assert http.post("/files/upload", content=b"x", headers=headers).status_code == 507
    assert service.temporary() == []


def test_a_row_that_cannot_be_written_leaves_no_object(
    service: StorageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file = service.store.add_file

    def broken(row: FileRow, announced: str | None = None, **_: Any) -> None:
        if announced is not None:
            raise RuntimeError("database")
        add_file(row)

    monkeypatch.setattr(service.store, "add_file", broken)
    with pytest.raises(RuntimeError):
        keep_file(service, b"x", key_id="k", name="a", content_type="a/b", seconds=None)
    assert list((service.settings.data / "files" / "objects").iterdir()) == []


def test_the_disk_is_never_filled(http: httpx.Client, key: str, service: StorageService) -> None:
    service.settings = dataclasses.replace(service.settings, free_bytes=2**60)
    answer = http.post("/files/upload", content=b"x", headers=as_key(key))
    assert (answer.status_code, answer.json()["error_type"]) == (507, "internal_error")
    assert service.temporary() == []


def test_an_object_that_a_crash_left_is_removed(service: StorageService, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    put = service.files.put

    def killed(name: str, source: Any) -> int:
        put(name, source)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(service.files, "put", killed)
        for part in (service.files, service.store):  # a dead process does not clean up
            patch.setattr(part, "delete" if part is service.files else "delete_file", lambda _: None)
        with pytest.raises(Killed):
            keep_file(service, b"x", key_id="k", name="a", content_type="a/b", seconds=None)
    objects = service.settings.data / "files" / "objects"
    assert len(list(objects.iterdir())) == 1
    assert remove_expired_files(service, time.time() + 1.1 * DAY) == 1
    assert list(objects.iterdir()) == []


def test_empty_files(http: httpx.Client, key: str) -> None:
    url = uploaded(http, key, b"")
    answer = http.get(url)
    assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, b"", "0")
    assert http.get(url, headers={"Range": "bytes=0-"}).status_code == 416


@pytest.mark.parametrize(
    "lifecycle",
    [
        *("x", "[]", "1", '{"expiration_duration_seconds": 0}', '{"expiration_duration_seconds": -5}', "[" * 20_000),
        *('{"expiration_duration_seconds": "60"}', '{"expiration_duration_seconds": true}'),
        *('{"expiration_duration_seconds": NaN}', '{"expiration_duration_seconds": Infinity}'),
    ],
)
def test_lifecycles_that_are_none(http: httpx.Client, key: str, lifecycle: str) -> None:
    headers = as_key(key) | {"X-Fal-Object-Lifecycle": lifecycle}
    answer = http.post("/files/upload", content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


def test_lifetimes(http: httpx.Client, key: str, service: StorageService) -> None:
    for text, seconds in [
        ('{"expiration_duration_seconds": 1e300}', 365 * DAY),
        ('{"expiration_duration_seconds": 1%s}' % ("0" * 400), 365 * DAY),
        ('{"initial_acl": {}}', 7 * DAY),
        ('{"expiration_duration_seconds": null}', 7 * DAY),
    ]:
        row = row_of(service, uploaded(http, key, **{"X-Fal-Object-Lifecycle-Preference": text}))
        assert row.expires_at == pytest.approx(row.created_at + seconds), text
    service.settings = dataclasses.replace(service.settings, object_seconds=None)
    assert row_of(service, uploaded(http, key)).expires_at is None


@pytest.mark.parametrize("about", [b"[]", b"x", b'{"file_name": 1}', b'{"content_type": []}', b"[" * 60_000])
def test_descriptions_that_are_none(http: httpx.Client, key: str, about: bytes) -> None:
    answer = http.post("/storage/upload/initiate", content=about, headers=as_key(key))
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


def test_descriptions_that_say_nothing(http: httpx.Client, key: str) -> None:
    for about in (b"", b"{}", b'{"file_name": null, "content_type": ""}'):
        answer = http.post("/storage/upload/initiate", content=about, headers=as_key(key)).json()
        assert answer["file_url"].endswith("/file.bin")
