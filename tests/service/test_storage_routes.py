"""Uploads and downloads through a real server: with fal's Python client, and with its JavaScript client's requests."""

import asyncio
import base64
import dataclasses
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fal_client
import httpx
import pytest
from fakes.storage_server import StorageService, served, storage_app
from fal_client import client as fal_module
from fastapi import FastAPI
from sparsectrl_lcm.service.auth.signed_tokens import make_token, read_token
from sparsectrl_lcm.service.http import request_bodies as uploads
from sparsectrl_lcm.service.objects.file_metadata import safe_content_type, safe_name
from sparsectrl_lcm.service.objects.stored_files import keep_file, new_file_id, remove_expired_files
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.store import FileRow

DAY = 86_400
PARTS = [b"a" * 3000, b"b" * 2000, b"c" * 4000, b"d" * 1]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FastAPI, str]]:
    app = storage_app()
    with served(app) as base:
        yield app, base


@pytest.fixture
def service(running: tuple[FastAPI, str], tmp_path: Path) -> StorageService:
    made = StorageService(
        tmp_path / "data", upload_bytes=10_000, part_bytes=5_000, body_seconds=0.3, object_seconds=7.0 * DAY
    )
    running[0].state.service = made
    return made


@pytest.fixture(scope="module")
def base(running: tuple[FastAPI, str]) -> str:
    return running[1]


@pytest.fixture
def key(service: StorageService) -> str:
    return service.new_key()


@pytest.fixture(scope="module")
def http(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base, timeout=10) as client:
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


# fal's Python client


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


# Requests like those of fal's JavaScript client (fal-protocol: 7.2)


def initiated(http: httpx.Client, key: str, multipart: bool = False, **headers: str) -> dict[str, str]:
    path = "/storage/upload/initiate-multipart" if multipart else "/storage/upload/initiate"
    about = {"content_type": "image/png", "file_name": "blob.png"}
    answer = http.post(f"{path}?storage_type=fal-cdn-v3", json=about, headers=as_key(key) | headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def part_url(upload_url: str, last: object) -> str:
    url = urlsplit(upload_url)
    return f"{url.scheme}://{url.netloc}{url.path}/{last}?{url.query}"


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


# Parts


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


def test_parts_in_any_order(http: httpx.Client, key: str, service: StorageService) -> None:
    url, headers = started(http, key)
    parts = sent_parts(http, url, headers, PARTS)
    assert [part["partNumber"] for part in parts] == [4, 3, 2, 1]
    answer = http.post(f"{url}/complete", json={"parts": parts}, headers=headers)
    assert http.get(answer.json()["access_url"]).content == b"".join(PARTS)
    again = http.post(f"{url}/complete", json={"parts": parts}, headers=headers)  # the first answer was lost
    assert (again.status_code, again.json()) == (200, answer.json())
    assert http.get(answer.json()["access_url"]).content == b"".join(PARTS)
    assert service.temporary() == []


def test_a_part_may_be_sent_again(http: httpx.Client, key: str) -> None:
    url, headers = started(http, key)
    old = sent_parts(http, url, headers, PARTS)
    new = http.put(f"{url}/2", content=b"other", headers=headers).headers["ETag"]
    refused = http.post(f"{url}/complete", json={"parts": old}, headers=headers)
    assert (refused.status_code, "Part 2 has another etag" in refused.text) == (400, True)
    # proxies weaken etags
    parts = [part | ({"etag": f"W/{new}"} if part["partNumber"] == 2 else {}) for part in old]
    answer = http.post(f"{url}/complete", json={"parts": parts}, headers=headers)
    assert http.get(answer.json()["access_url"]).content == PARTS[0] + b"other" + PARTS[2] + PARTS[3]


def test_a_part_that_changes_while_parts_are_joined(http: httpx.Client, key: str, service: StorageService) -> None:
    url, headers = started(http, key)
    parts = sent_parts(http, url, headers, PARTS)
    file_id = urlsplit(url).path.split("/")[2]
    service.files.put(f"parts/{file_id}-3", b"other")
    answer = http.post(f"{url}/complete", json={"parts": parts}, headers=headers)
    assert (answer.status_code, "Part 3" in answer.text) == (400, True)
    assert service.store.get_file(file_id) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: [], "1 to 1000 parts"),
        (lambda parts: {}, "1 to 1000 parts"),
        (lambda parts: None, "1 to 1000 parts"),
        (lambda parts: parts[:1] * 1001, "1 to 1000 parts"),
        (lambda parts: parts[1:], "part 1 is missing"),
        (lambda parts: [*parts[:1], *parts[2:]], "part 2 is missing"),
        (lambda parts: [*parts, {"partNumber": 5, "etag": "x"}], "Part 5 was not uploaded"),
        (lambda parts: [*parts, {"partNumber": 0, "etag": "x"}], "part 5 is missing"),
        (lambda parts: [*parts, {"partNumber": 4, "etag": "x"}], "part 4 is there twice"),
        (lambda parts: [{**parts[0], "etag": parts[1]["etag"]}, *parts[1:]], "Part 1 has another etag"),
        (lambda parts: [{"partNumber": 1}, *parts[1:]], "partNumber, etag"),
        (lambda parts: [{"partNumber": "1", "etag": "x"}], "partNumber, etag"),
        (lambda parts: [{"partNumber": True, "etag": "x"}], "partNumber, etag"),
        (lambda parts: [{"partNumber": 1, "etag": None}], "partNumber, etag"),
        (lambda parts: ["x"], "partNumber, etag"),
    ],
)
def test_parts_that_do_not_fit(http: httpx.Client, key: str, change: Any, message: str) -> None:
    url, headers = started(http, key)
    parts = sorted(sent_parts(http, url, headers, PARTS), key=lambda part: part["partNumber"])
    answer = http.post(f"{url}/complete", json={"parts": change(parts)}, headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")
    assert message in answer.json()["detail"]
    assert http.post(f"{url}/complete", json={"parts": parts}, headers=headers).status_code == 200


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'"x"', b"[" * 100_000])
def test_lists_of_parts_that_are_none(http: httpx.Client, key: str, body: bytes) -> None:
    url, headers = started(http, key)
    assert http.post(f"{url}/complete", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("number", ["0", "1001", "-1", "1.5", "x", "²", "99999999999999999999", "+1", "%20"])
def test_numbers_that_no_part_has(http: httpx.Client, key: str, number: str) -> None:
    url, headers = started(http, key)
    assert http.put(f"{url}/{number}", content=b"x", headers=headers).status_code == 400


def test_parts_are_bounded(http: httpx.Client, key: str, service: StorageService) -> None:
    url, headers = started(http, key)
    answer = http.put(f"{url}/1", content=b"x" * 5001, headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (413, "file_too_large")
    sent_parts(http, url, headers, [b"x" * 5000, b"x" * 5000])
    answer = http.put(f"{url}/3", content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (413, "file_too_large")
    assert len(list((service.settings.data / "files").glob("parts/*"))) == 2
    parts = sent_parts(http, url, headers, [b"x" * 5000, b"x" * 4999])
    assert http.put(f"{url}/3", content=b"x", headers=headers).status_code == 200
    assert http.post(f"{url}/complete", json={"parts": parts}, headers=headers).status_code == 200


def test_parts_are_no_files(http: httpx.Client, key: str, service: StorageService) -> None:
    url, headers = started(http, key)
    (part,) = sent_parts(http, url, headers, [b"secret"])
    file_id = urlsplit(url).path.split("/")[2]
    assert service.store.get_file(f"{file_id}.1") is not None
    for name in (part["etag"].strip('"'), "big.png", "file.bin"):
        assert http.get(f"/files/{file_id}.1/{name}").status_code == 404


def test_uploads_that_nobody_completes(http: httpx.Client, key: str, service: StorageService) -> None:
    url, headers = started(http, key)
    sent_parts(http, url, headers, PARTS)
    kept = uploaded(http, key)
    objects = service.settings.data / "files" / "parts"
    service.settings.data.joinpath("tmp", "left").write_bytes(b"x")
    service.settings.work.mkdir()  # belongs to the runner, which may be idle for days
    os.utime(service.settings.work, (0, 0))
    assert remove_expired_files(service, time.time() + 0.9 * DAY) == 0
    assert len(list(objects.iterdir())) == len(PARTS)
    assert remove_expired_files(service, time.time() + 1.1 * DAY) == len(PARTS)
    assert list(objects.iterdir()) == []
    assert service.temporary() == []
    assert service.settings.work.is_dir()
    assert http.get(kept).status_code == 200
    assert remove_expired_files(service, time.time() + 7.1 * DAY) == 1
    assert http.get(kept).status_code == 404
    assert list((service.settings.data / "files" / "objects").iterdir()) == []


def test_what_cannot_be_removed_stays_known(
    http: httpx.Client, key: str, service: StorageService, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = (row_of(service, uploaded(http, key)) for _ in range(2))
    delete = service.files.delete

    def broken(name: str) -> None:
        if name == stuck.object_name:
            raise PermissionError(13, "no")
        delete(name)

    monkeypatch.setattr(service.files, "delete", broken)
    assert remove_expired_files(service, time.time() + 8 * DAY) == 1
    assert service.store.get_file(stuck.id) is not None
    assert service.store.get_file(other.id) is None


# Owners of uploads


def test_the_storage_token(http: httpx.Client, key: str, base: str) -> None:
    answer = http.post("/storage/auth/token", headers=as_key(key)).json()
    from datetime import datetime

    expires = datetime.fromisoformat(answer["expires_at"])
    assert expires.tzinfo is not None
    assert 3000 < expires.timestamp() - time.time() <= 3600
    assert (answer["token_type"], answer["base_url"]) == ("Bearer", base)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Key a:b"}, {"Authorization": "Bearer x"}])
def test_uploads_need_a_key(http: httpx.Client, service: StorageService, headers: dict[str, str]) -> None:
    calls = [
        ("/storage/auth/token", {}),
        ("/files/upload", {"content": b"x"}),
        ("/files/upload/multipart", {}),
        ("/storage/upload/initiate", {"json": {}}),
        ("/storage/upload/initiate-multipart", {"json": {}}),
        ("/files/x/y/multipart/z/complete", {"json": {}}),
    ]
    for path, options in calls:
        assert http.post(path, headers=headers, **options).status_code == 401, path
    assert http.put("/files/x/y/multipart/z/1", headers=headers, content=b"x").status_code == 401
    assert service.temporary() == []


def test_a_key_uploads_without_a_token_too(http: httpx.Client, key: str) -> None:
    for scheme in ("Key", "Bearer"):
        answer = http.post("/files/upload", content=b"curl", headers={"Authorization": f"{scheme} {key}"})
        assert http.get(answer.json()["access_url"]).content == b"curl"


def test_forged_tokens(http: httpx.Client, key: str, service: StorageService) -> None:
    urls = initiated(http, key)
    path, token = urls["upload_url"].split("?token=")
    payload, _, signature = token.partition(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    changed = base64.urlsafe_b64encode(json.dumps(claims | {"key_id": "other"}).encode()).decode().rstrip("=")
    forged = ["", "x", ".", payload, f"{payload}.", f".{signature}", f"{changed}.{signature}", f"{token}x", token[:-1]]
    forged += [f"{payload}={'.'}{signature}", f"{token}.", "x" * 20_000, "é.ü", f"{token[:-1]}\u0660"]
    forged += [make_token(b"t" * 32, "upload", claims, time.time() + 60)]
    forged += [make_token(service.secret, kind, claims, time.time() + 60) for kind in ("bearer", "multipart")]
    for index in range(0, len(token), 7):
        forged.append(token[:index] + ("A" if token[index] != "A" else "B") + token[index + 1 :])
    for text in forged:
        answer = http.put(path, params={"token": text}, content=b"forged")
        assert answer.status_code == 403, text
    assert http.put(path, content=b"forged").status_code == 403
    assert http.get(urls["file_url"]).status_code == 404
    assert http.put(urls["upload_url"], content=b"real").status_code == 200


def test_tokens_expire(http: httpx.Client, key: str, service: StorageService) -> None:
    urls = initiated(http, key)
    path, token = urls["upload_url"].split("?token=")
    claims = read_token(service.secret, "upload", token, time.time())
    old = make_token(service.secret, "upload", claims, time.time() - 1)
    answer = http.put(path, params={"token": old}, content=b"late")
    assert (answer.status_code, "expired" in answer.json()["detail"]) == (403, True)
    bearer = make_token(service.secret, "bearer", {"key_id": key.partition(":")[0]}, time.time() - 1)
    answer = http.post("/files/upload", content=b"late", headers={"Authorization": f"Bearer {bearer}"})
    assert (answer.status_code, "expired" in answer.json()["detail"]) == (401, True)


def test_when_tokens_expire(service: StorageService) -> None:
    token = make_token(service.secret, "upload", {"a": 1}, 1000.0)
    assert read_token(service.secret, "upload", token, 999.9) == {"a": 1}
    with pytest.raises(ServiceError):
        read_token(service.secret, "upload", token, 1000.0)
    with pytest.raises(ServiceError):
        read_token(service.secret, "bearer", token, 0.0)
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def test_uploads_of_other_keys(http: httpx.Client, key: str, service: StorageService) -> None:
    url, headers = started(http, key)
    parts = sent_parts(http, url, headers, PARTS)
    foreign = token_of(http, service.new_key())
    assert http.put(f"{url}/1", content=b"foreign", headers=foreign).status_code == 403
    assert http.post(f"{url}/complete", json={"parts": parts}, headers=foreign).status_code == 403
    other_url, _ = started(http, key)
    other_file, _, other_id = other_url.rpartition("/")
    own_file, _, own_id = url.rpartition("/")
    for mixed in (f"{other_file}/{own_id}", f"{own_file}/{other_id}"):
        assert http.put(f"{mixed}/1", content=b"mixed", headers=headers).status_code == 403
        assert http.post(f"{mixed}/complete", json={"parts": parts}, headers=headers).status_code == 403
    answer = http.post(f"{url}/complete", json={"parts": parts}, headers=headers)
    assert http.get(answer.json()["access_url"]).content == b"".join(PARTS)


def test_files_of_other_keys_are_not_written(http: httpx.Client, key: str, service: StorageService) -> None:
    """Even a token that this server signed does not give access to a file of another key."""
    row = row_of(service, uploaded(http, key, b"kept"))
    claims = {"key_id": service.new_key().partition(":")[0], "file_id": row.id, "name": "x", "content_type": "a/b"}
    token = make_token(service.secret, "upload", claims | {"seconds": None}, time.time() + 60)
    assert http.put(f"/storage/upload/{row.id}", params={"token": token}, content=b"new").status_code == 403
    with service.files.open(row.object_name) as file:
        assert file.read() == b"kept"


def test_the_token_of_one_upload_is_no_other(http: httpx.Client, key: str) -> None:
    one, parts = initiated(http, key)["upload_url"], initiated(http, key, multipart=True)["upload_url"]
    for url in (part_url(one, 1), parts):
        assert http.put(url, content=b"x").status_code == 403
    assert http.post(part_url(one, "complete"), json={"parts": []}).status_code == 403
    (path, _), (_, token) = one.split("?token="), initiated(http, key)["upload_url"].split("?token=")
    assert http.put(path, params={"token": token}, content=b"x").status_code == 403


def test_revoked_keys(http: httpx.Client, key: str, service: StorageService) -> None:
    bearer, urls = token_of(http, key), initiated(http, key)
    parts = initiated(http, key, multipart=True)
    service.store.revoke_key(key.partition(":")[0], time.time())
    assert http.post("/files/upload", content=b"x", headers=bearer).status_code == 401
    assert http.put(urls["upload_url"], content=b"x").status_code == 403
    assert http.put(part_url(parts["upload_url"], 1), content=b"x").status_code == 403


def test_anonymous_callers(http: httpx.Client, service: StorageService) -> None:
    service.settings = dataclasses.replace(service.settings, anonymous=True)
    url = "/storage/auth/token"
    bearer = {"Authorization": f"Bearer {http.post(url).json()['token']}"}
    service.settings = dataclasses.replace(service.settings, anonymous=False)
    assert http.post("/files/upload", content=b"x", headers=bearer).status_code == 401
    service.settings = dataclasses.replace(service.settings, anonymous=True)
    assert http.post("/files/upload", content=b"x", headers=bearer).status_code == 200


# Bodies


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


def test_nothing_is_read_of_a_body_that_says_it_is_too_large(http: httpx.Client, key: str, base: str) -> None:
    with raw_upload(http, key, base, "Content-Length: 99999999999") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def raw_upload(http: httpx.Client, key: str, base: str, framing: str) -> socket.socket:
    url = urlsplit(base)
    connection = socket.create_connection((url.hostname, url.port), timeout=10)
    head = [
        "POST /files/upload HTTP/1.1",
        f"Host: {url.netloc}",
        f"Authorization: {token_of(http, key)['Authorization']}",
    ]
    connection.sendall("\r\n".join([*head, framing, "", ""]).encode())
    return connection


def test_bodies_that_stall(http: httpx.Client, key: str, base: str, service: StorageService) -> None:
    start = time.monotonic()
    with raw_upload(http, key, base, "Content-Length: 1000") as connection:
        connection.sendall(b"x" * 10)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # the server closes
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"too slowly" in answer
    assert time.monotonic() - start < 5
    assert service.temporary() == []


def test_bodies_that_drip(http: httpx.Client, key: str, base: str, service: StorageService) -> None:
    """Each chunk arrives in time, but the whole body takes too long."""
    start = time.monotonic()
    with raw_upload(http, key, base, "Transfer-Encoding: chunked") as connection:
        connection.settimeout(0.02)
        answer = b""
        while not answer and time.monotonic() - start < 9:
            connection.sendall(b"1\r\nx\r\n")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 400")
    assert service.temporary() == []


def test_clients_that_go(http: httpx.Client, key: str, base: str, service: StorageService) -> None:
    service.settings = dataclasses.replace(service.settings, body_seconds=30.0)
    connection = raw_upload(http, key, base, "Content-Length: 1000")
    connection.sendall(b"x" * 10)
    wait_for(lambda: len(service.temporary()) == 1)
    connection.close()
    wait_for(lambda: service.temporary() == [])
    assert list((service.settings.data / "files").glob("objects/*")) == []


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


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


# Names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("keyframe.png", "keyframe.png"),
        ("My Drawing (1).PNG", "My_Drawing_1_.PNG"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system.ini", "system.ini"),
        ("/", "file.png"),
        ("..", "file.png"),
        ("", "file.png"),
        (None, "file.png"),
        (".htaccess", "htaccess"),
        ("a\r\nSet-Cookie: x=y.png", "a_Set-Cookie_x_y.png"),
        ("nul\0byte.png", "nul_byte.png"),
        ("スケッチ.png", "スケッチ.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("right\u202eleft.png", "right_left.png"),
        ("a" * 300 + ".png", "a" * 96 + ".png"),
        ("1700000000000.octet", "1700000000000.octet"),
        ("%2e%2e%2fpasswd", "2e_2e_2fpasswd"),
        ("archive.tar.gz", "archive.tar.gz"),
    ],
)
def test_names_of_files(given: str | None, expected: str) -> None:
    assert safe_name(given, "image/png") == expected


def test_any_name_gives_a_url_that_works(http: httpx.Client, key: str, base: str) -> None:
    names = random.Random(5)
    alphabet = "../\\\0\r\n\t :?#%&;=@+*\"'<>|~`{}[]()a.Z9_-é漢\u202e\U0001f600\ud800"
    for index in range(150):
        name = "".join(names.choices(alphabet, k=names.randint(0, 200 if index % 10 == 0 else 12)))
        about = {"file_name": name, "content_type": "image/png"}
        answer = http.post("/storage/upload/initiate", content=json.dumps(about), headers=as_key(key))
        urls = answer.json()
        url = urls["file_url"]
        assert url.isascii()
        _, folder, file_id, shown = urlsplit(url).path.split("/")
        assert (folder, len(file_id)) == ("files", 22)
        assert unquote(shown) == safe_name(name, "image/png")
        assert shown not in ("", ".", "..")
        assert not set(unquote(shown)) & set("/\\\0\r\n\"'<>;: ?#%\u202e")
        assert unquote(shown)[0] != "."
        assert len(unquote(shown).encode()) <= 100
        if index % 5 == 0:
            http.put(urls["upload_url"], content=b"x").raise_for_status()
            answer = http.get(url)
            assert (answer.status_code, str(answer.url)) == (200, url)


def test_names_in_headers(http: httpx.Client, key: str) -> None:
    for raw, expected in [("スケッチ.png".encode(), "スケッチ.png"), ("é.png".encode("latin-1"), "é.png")]:
        headers = [(b"Authorization", f"Key {key}".encode()), (b"X-Fal-File-Name", raw)]
        url = http.post("/files/upload", content=b"x", headers=headers).json()["access_url"]
        assert unquote(url).endswith(f"/{expected}")
        assert http.get(url).status_code == 200


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("image/png", "image/png"),
        ("Image/PNG; charset=x", "image/png"),
        ("image/svg+xml", "image/svg+xml"),
        ("application/vnd.api+json", "application/vnd.api+json"),
        ("", "application/octet-stream"),
        (None, "application/octet-stream"),
        ("image", "application/octet-stream"),
        ("image/png\r\nX: y", "application/octet-stream"),
        ("image/png/x", "application/octet-stream"),
        ("é/png", "application/octet-stream"),
        ("a" * 99 + "/b", "application/octet-stream"),
    ],
)
def test_content_types(given: str | None, expected: str) -> None:
    assert safe_content_type(given) == expected


# Downloads


CONTENT = bytes(range(256)) * 3000  # three chunks


@pytest.fixture
def file_url(service: StorageService, base: str) -> str:
    row = keep_file(service, CONTENT, key_id="k", name="clip.mp4", content_type="video/mp4", seconds=DAY)
    return f"{base}/files/{row.id}/clip.mp4"


def test_whole_files(http: httpx.Client, file_url: str) -> None:
    got, head = http.get(file_url), http.head(file_url)
    assert got.content == CONTENT
    assert head.content == b""
    for answer in (got, head):
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "video/mp4"
        assert answer.headers["Content-Length"] == str(len(CONTENT))
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["ETag"].startswith('"')
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == "sandbox"
        assert answer.headers["Cache-Control"] == "public, max-age=3600"


SIZE = len(CONTENT)


@pytest.mark.parametrize(
    ("header", "first", "last"),  # RFC 9110, 14.1
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-499", 0, 499),
        ("bytes=500-999", 500, 999),
        ("bytes=0-", 0, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        ("bytes=-500", SIZE - 500, SIZE - 1),
        (f"bytes=-{SIZE + 5}", 0, SIZE - 1),
        (f"bytes=5-{SIZE + 5}", 5, SIZE - 1),
        ("bytes=262143-262145", 262143, 262145),
        ("Bytes=7-8", 7, 8),
        ("bytes= 7-8", 7, 8),
    ],
)
def test_ranges(http: httpx.Client, file_url: str, header: str, first: int, last: int) -> None:
    for answer in (http.get(file_url, headers={"Range": header}), http.head(file_url, headers={"Range": header})):
        assert answer.status_code == 206
        assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
        assert answer.headers["Content-Length"] == str(last - first + 1)
        if answer.request.method == "GET":
            assert answer.content == CONTENT[first : last + 1]


@pytest.mark.parametrize("header", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 1}", "bytes=-0", "bytes=999999999999-"])
def test_ranges_outside(http: httpx.Client, file_url: str, header: str) -> None:
    answer = http.get(file_url, headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "header", ["bytes=", "bytes=-", "bytes=5-4", "bytes=a-b", "bytes=0-1,5-6", "items=0-1", "bytes=²-"]
)
def test_ranges_that_are_ignored(http: httpx.Client, file_url: str, header: str) -> None:
    answer = http.get(file_url, headers={"Range": header.encode("latin-1")})
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


def test_conditions(http: httpx.Client, file_url: str) -> None:
    etag = http.get(file_url).headers["ETag"]
    for value in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = http.get(file_url, headers={"If-None-Match": value})
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", etag)
    assert http.get(file_url, headers={"If-None-Match": '"x"'}).status_code == 200
    assert http.get(file_url, headers={"If-Range": etag, "Range": "bytes=0-1"}).status_code == 206
    assert http.get(file_url, headers={"If-Range": '"x"', "Range": "bytes=0-1"}).status_code == 200


@pytest.mark.parametrize(
    ("content_type", "where"),
    [
        ("video/mp4", "inline"),
        ("image/png", "inline"),
        ("text/plain", "inline"),
        ("text/html", "attachment"),
        ("application/xhtml+xml", "attachment"),
        ("image/svg+xml", "attachment"),
        ("image/svg", "attachment"),
        ("text/xml", "attachment"),
        ("image/x+xml", "attachment"),
        ("application/xml", "attachment"),
        ("text/javascript", "attachment"),
        ("application/pdf", "attachment"),
        ("application/octet-stream", "attachment"),
        ("multipart/x-mixed-replace", "attachment"),
        ("text/cache-manifest", "attachment"),
    ],
)
def test_nothing_is_executed(http: httpx.Client, key: str, content_type: str, where: str) -> None:
    url = uploaded(http, key, b"<script>alert(1)</script>", "ä.html", **{"Content-Type": content_type})
    answer = http.get(url)
    assert answer.headers["Content-Type"] == content_type
    assert answer.headers["Content-Disposition"] == f"{where}; filename*=UTF-8''%C3%A4.html"


def test_files_that_are_not_there(http: httpx.Client, file_url: str, service: StorageService) -> None:
    file_id = file_url.split("/")[-2]
    row = service.store.get_file(file_id)
    assert row is not None
    paths = [f"/files/{new_file_id()}/clip.mp4", f"/files/{file_id}/other.mp4", f"/files/{file_id}/CLIP.mp4"]
    paths += [f"/files/{file_id}x/clip.mp4", f"/files/{file_id}%00/clip.mp4", "/files/x/y", f"/files/{'a' * 5000}/y"]
    for path in paths:
        answer = http.get(path)
        assert answer.status_code == 404, path
        assert "detail" in answer.json()
    for path in (
        "/files/..%2f..%2fservice.sqlite3/x",
        f"/files/{file_id}/..%2f..%2fservice.sqlite3",
        "/files/%2e%2e/tmp",
    ):
        assert http.get(path).status_code == 404
    service.store.add_file(dataclasses.replace(row, expires_at=time.time() + 30))
    assert http.get(file_url).headers["Cache-Control"] in ("public, max-age=29", "public, max-age=30")
    service.store.add_file(dataclasses.replace(row, expires_at=time.time() - 1))
    assert http.get(file_url).status_code == 404
    service.store.add_file(row)
    service.files.delete(row.object_name)
    assert http.get(file_url).status_code == 404


def test_a_download_that_is_left(http: httpx.Client, service: StorageService, base: str) -> None:
    """The file is closed when the client disconnects."""
    row = keep_file(service, b"x" * 30_000_000, key_id="k", name="a.mp4", content_type="video/mp4", seconds=DAY)
    opened = []
    open_file = service.files.open

    def watched(name: str, start: int = 0) -> Any:
        opened.append(open_file(name, start))
        return opened[-1]

    service.files.open = watched  # type: ignore[method-assign]
    with http.stream("GET", f"{base}/files/{row.id}/a.mp4") as answer:
        next(answer.iter_bytes(10))
    wait_for(lambda: opened[0].closed)


def test_an_old_version_is_read_to_its_end(http: httpx.Client, key: str, service: StorageService) -> None:
    service.settings = dataclasses.replace(service.settings, upload_bytes=2**30)
    urls = initiated(http, key)
    first, second = b"1" * 20_000_000, b"2" * 10
    http.put(urls["upload_url"], content=first)
    with http.stream("GET", urls["file_url"]) as answer:
        chunks = answer.iter_bytes()
        start = next(chunks)
        http.put(urls["upload_url"], content=second).raise_for_status()
        assert start + b"".join(chunks) == first
    assert http.get(urls["file_url"]).content == second
