"""Uploads in parts."""

import os
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fakes.storage_server import StorageService
from sparsectrl_lcm.service.objects.stored_files import remove_expired_files

from .conftest import DAY, PARTS, row_of, sent_parts, started, uploaded


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
