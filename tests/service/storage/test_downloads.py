"""Downloads: ranges, conditions, what a browser may show."""

import dataclasses
from typing import Any

import httpx
import pytest
from fakes.storage_server import StorageService
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.objects.stored_files import keep_file, new_file_id

from ..waiting import wait_until
from .conftest import DAY, initiated, uploaded

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


def test_files_that_are_not_there(
    http: httpx.Client, file_url: str, service: StorageService, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(clock, "now", lambda: row.created_at)
    service.store.add_file(dataclasses.replace(row, expires_at=row.created_at + 30))
    assert http.get(file_url).headers["Cache-Control"] == "public, max-age=30"
    service.store.add_file(dataclasses.replace(row, expires_at=row.created_at - 1))
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
    wait_until(lambda: opened[0].closed)


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
