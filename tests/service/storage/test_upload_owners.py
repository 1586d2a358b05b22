"""Whose uploads are whose: keys, and the tokens of storage and of single uploads."""

import base64
import dataclasses
import json
import time

import httpx
import pytest
from fakes.storage_server import StorageService
from sparsectrl_lcm.service.auth.signed_tokens import make_token, read_token
from sparsectrl_lcm.service.protocol.errors import ServiceError

from .conftest import PARTS, as_key, initiated, part_url, row_of, sent_parts, started, token_of, uploaded


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
