"""Hostile input: the answer is a 4xx in fal's form, never a 5xx, a hang or a leak."""

import base64
import http.client
import json
import socket
import struct
import time
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import httpx
import pytest
from sparsectrl_lcm.service.network.keyframe_urls import _data_of
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.protocol.input_parsing import parse_input

from .conftest import APP, Server, started
from .waiting import SECONDS

ODD_BODIES = [
    b"{",
    b"[]",
    b"null",
    b'"a"',
    b"{'prompt': 1}",
    b'{"prompt": NaN}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": ' + b"9" * 5000 + b"}",
]
ODD_INPUTS: list[dict[str, Any]] = [
    {},
    {"prompt": None},
    {"prompt": ["a"]},
    {"prompt": "a" * 20_000},
    {"prompt": "a", "seed": 2**64},
    {"prompt": "a", "seed": 1e300},
    {"prompt": "a", "seed": "x"},
    {"prompt": "a", "num_inference_steps": 0},
    {"prompt": "a", "guidance_scale": 1.2},
    {"prompt": "a", "keyframe_0_index": 16},
    {"prompt": "a", "controlnet_type": "canny"},
    {"prompt": "\ud800"},
    {"prompt": "a", "keyframe_0_image_url": "data:,x", "keyframe_1_image_url": "data:,x"},
]
ODD_KEYFRAMES = {
    "data:image/png;base64,AAAA": "image_load_error",
    "data:image/png;base64,%%%": "file_download_error",
    "http://127.0.0.2:9/x.png": "file_download_error",
    "http://169.254.169.254/latest/meta-data": "file_download_error",
    "http://[::1]/": "file_download_error",
    "http://2130706434/": "file_download_error",
    "file:///etc/passwd": "file_download_error",
    "gopher://example.com/": "file_download_error",
    "not a url": "file_download_error",
}


@pytest.fixture
def client(stub: Server) -> httpx.Client:
    return httpx.Client(headers=stub.headers(), timeout=30)


@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
@pytest.mark.parametrize("queued", [False, True])
def test_bodies_that_are_no_input(stub: Server, client: httpx.Client, body: bytes, queued: bool) -> None:
    answer = client.post(stub.queue if queued else f"{stub.url}/{APP}", content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "body"
    assert answer.headers["x-fal-request-id"]


@pytest.mark.parametrize("given", ODD_INPUTS, ids=range(len(ODD_INPUTS)))
def test_inputs_that_are_not_allowed(stub: Server, client: httpx.Client, given: dict[str, Any]) -> None:
    direct = client.post(f"{stub.url}/{APP}", content=json.dumps(given))
    assert direct.status_code == 422
    accepted = client.post(stub.queue, content=json.dumps(given)).raise_for_status().json()
    assert client.get(f"{stub.queue}/requests/{accepted['request_id']}/status").status_code == 200
    later = client.get(f"{stub.queue}/requests/{accepted['request_id']}")
    assert (later.status_code, later.json()) == (422, direct.json())
    for detail in direct.json()["detail"]:
        assert detail["loc"][0] == "body" and detail["msg"] and detail["type"]


@pytest.mark.parametrize("url", ODD_KEYFRAMES)
def test_keyframes_that_are_none(stub: Server, client: httpx.Client, url: str) -> None:
    answer = client.post(f"{stub.url}/{APP}", json={"prompt": "a", "keyframe_1_image_url": url})
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    assert detail["loc"] == ["body", "keyframe_1_image_url"]
    assert detail["type"] == ODD_KEYFRAMES[url]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_large_bodies_are_refused_early(stub: Server, chunked: bool, known: bool) -> None:
    """A client that goes on sending can still read the answer, with a key and without one."""
    head = f"POST /queue/{APP} HTTP/1.1\r\nHost: x\r\n" + (f"Authorization: Key {stub.key}\r\n" if known else "")
    size = 100 * 2**20
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {size}\r\n\r\n"
    block = (b"100000\r\n" if chunked else b"") + b" " * 2**20 + (b"\r\n" if chunked else b"")
    with socket.create_connection(("127.0.0.1", stub.port), timeout=SECONDS) as sock:
        sock.sendall(head.encode())
        try:
            for _ in range(size // 2**20):
                sock.sendall(block)
        except OSError:
            pass  # the server has closed after its wait
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == (413 if known else 401)
        assert json.loads(answer.read())["detail"]
        assert sock.recv(1) == b""


def png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> str:
    """A data URI of a PNG with one bit per pixel."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return "data:image/png;base64," + base64.b64encode(made).decode()


def test_bombs_are_no_keyframes(stub: Server, client: httpx.Client) -> None:
    def nothing(size: int) -> bytes:
        return zlib.compress(bytes(size), 1)

    bombs = {
        "pixels": png(30_000, 30_000, nothing(30_000 * 3751)),
        "said pixels": png(2**31 - 1, 2**31 - 1, nothing(9)),
        "more than said": png(8, 8, nothing(2**26)),
        "text": png(8, 8, nothing(16), (b"zTXt", b"a\0\0" + nothing(2**27))),
        "profile": png(8, 8, nothing(16), (b"iCCP", b"a\0\0" + nothing(2**27))),
    }
    for name, bomb in bombs.items():
        answer = client.post(f"{stub.url}/{APP}", json={"prompt": "a", "keyframe_2_image_url": bomb})
        fine = name in ("more than said", "profile")  # chunks and data that the picture does not need are ignored
        assert answer.status_code == 422 or (fine and answer.status_code == 200), (name, answer.text[:300])
        if answer.status_code == 422:
            (detail,) = answer.json()["detail"]
            assert detail["loc"] == ["body", "keyframe_2_image_url"]
            assert "longer than" not in detail["msg"], name


def test_a_long_prompt_is_refused_by_its_length_alone() -> None:
    text = "a" * 2**22 + "\ud800"
    start = time.thread_time()
    with pytest.raises(ServiceError) as refused:
        parse_input({"prompt": text, "negative_prompt": text}, 100, 16)
    assert time.thread_time() - start < 0.2
    assert [detail["type"] for detail in refused.value.body["detail"] if "length" in str(detail)] == [
        "string_too_long"
    ] * 2


def test_a_percent_encoded_data_uri_is_read_at_once() -> None:
    data = bytes(range(256)) * 2000
    odd = ["a%", "%4", "%%41", "%zz%41%", "%e9%E9", "", "%41"]
    text = "".join(f"%{byte:02x}" for byte in data)
    start = time.thread_time()
    assert _data_of("data:," + text) == data
    seconds, start = time.thread_time() - start, time.thread_time()
    assert unquote_to_bytes(text) == data
    assert seconds < (time.thread_time() - start) / 2
    assert [_data_of("data:," + text) for text in odd] == [unquote_to_bytes(text) for text in odd]


def test_wrong_runs_count_against_their_key(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load", key_unstarted=2):
        with httpx.Client(headers=server.headers()) as client:
            run = f"{server.url}/{APP}"
            assert [client.post(run, json={}).status_code for _ in range(4)] == [422, 422, 429, 429]
            surrogate = {"prompt": "a", "keyframe_0_image_url": "http://127.0.0.1/files/\ud800/\ud800"}
            other = server.headers(server.new_key("other"))
            answer = client.post(run, content=json.dumps(surrogate), headers=other)
            assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "string_unicode")


def test_keys(stub: Server, client: httpx.Client) -> None:
    request_id = client.post(stub.queue, json={"prompt": "a"}).json()["request_id"]
    url = f"{stub.queue}/requests/{request_id}"
    other = stub.headers(stub.new_key("other"))
    for path in ("", "/status", "/status/stream"):
        answer = httpx.get(url + path, headers=other)
        assert (answer.status_code, answer.json()) == (404, {"status": "NOT_FOUND"})
        for wrong in ("", "Key", "Key a:b", f"Key {stub.key}x", "Basic YTpi", "Key \xff:\xff"):
            headers = [(b"Authorization", wrong.encode("latin-1"))] if wrong else []
            assert httpx.get(url + path, headers=headers).status_code == 401
    assert httpx.put(url + "/cancel", headers=other).status_code == 404
    assert httpx.post(stub.queue, json={"prompt": "a"}).status_code == 401
    assert client.get(f"{stub.queue}/requests/{'x' * 300}/status").status_code == 404
    assert client.get(f"{stub.queue}/requests/%00/status").status_code == 404


def test_a_revoked_key_is_refused(stub: Server) -> None:
    import subprocess
    import sys

    key = stub.new_key("short")
    url = f"{stub.queue}/requests/none/status"
    assert httpx.get(url, headers=stub.headers(key)).status_code == 404
    code = "from sparsectrl_lcm.cli import main; main()"
    revoke = [sys.executable, "-c", code, "keys", "revoke", key.partition(":")[0], "--data", str(stub.data)]
    subprocess.run(revoke, check=True, capture_output=True)
    time.sleep(2.1)
    assert httpx.get(url, headers=stub.headers(key)).status_code == 401
    assert key.partition(":")[2].encode() not in (stub.data / "service.sqlite3").read_bytes()


def test_headers_and_queries(stub: Server, client: httpx.Client) -> None:
    for headers in ({"X-Fal-Request-Timeout": "soon"}, {"X-Fal-Object-Lifecycle-Preference": "{"}):
        assert client.post(stub.queue, json={"prompt": "a"}, headers=headers).status_code == 400
    for query in ({"fal_webhook": "ftp://x"}, {"fal_webhook": "http://["}, {"fal_max_queue_length": "-1"}):
        assert client.post(stub.queue, json={"prompt": "a"}, params=query).status_code == 400
    assert client.get(f"{stub.url}/files/../../etc/passwd").status_code == 404
    assert client.get(f"{stub.url}/files/%2e%2e/%2e%2e%2fetc%2fpasswd").status_code == 404
    proxied = client.post(f"{stub.url}/api/fal/proxy", headers={"x-fal-target-url": "https://evil.example/x"})
    assert proxied.status_code == 412
    assert client.post(f"{stub.url}/api/fal/proxy").status_code == 400
    assert client.patch(f"{stub.url}/api/fal/proxy").status_code == 405
    assert client.delete(stub.queue).status_code == 405


def test_forged_tokens_and_paths(stub: Server, client: httpx.Client) -> None:
    about = {"file_name": "../../../a.png", "content_type": "image/png"}
    made = client.post(f"{stub.url}/storage/upload/initiate", json=about).json()
    url, token = made["upload_url"].split("token=")
    payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    other = base64.urlsafe_b64encode(json.dumps(claims | {"exp": 2e10}).encode()).decode().rstrip("=")
    for forged in ("", token[:-1], f"{other}.{signature}", f"{payload}.", f".{signature}", "\xff.\xff"):
        assert httpx.put(url, params={"token": forged}, content=b"x").status_code == 403
    storage = client.post(f"{stub.url}/storage/auth/token").json()["token"]
    assert httpx.put(url, params={"token": storage}, content=b"x").status_code == 403
    for forged in (token, storage + "x", "a.b"):
        headers = {"Authorization": f"Bearer {forged}"}
        assert httpx.post(f"{stub.url}/files/upload", headers=headers, content=b"x").status_code == 401
    httpx.put(made["upload_url"], content=b"x").raise_for_status()
    assert made["file_url"].endswith("/a.png") and httpx.get(made["file_url"]).content == b"x"
    file_id = made["file_url"].split("/files/")[1].split("/")[0]
    names = f"{file_id}/..%2f{file_id}%2fa.png", "..%2f..%2fservice.sqlite3/a", f"{file_id}%2f../a.png", "%00/a"
    for path in ("*", *(f"/files/{name}" for name in names)):
        with socket.create_connection(("127.0.0.1", stub.port), timeout=SECONDS) as sock:  # clients normalise paths
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert b" 404 " in sock.recv(100)


def test_slow_senders_are_cut_off(tmp_path: Path) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load", header_seconds=1.0, body_seconds=1.0):
        whole = b"POST /queue/" + APP.encode() + b" HTTP/1.1\r\nHost: x\r\nAuthorization: Key " + server.key.encode()
        for head in (b"", b"GET / HT", whole + b"\r\nContent-Length: 100\r\n\r\n{"):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(head)
                sock.settimeout(SECONDS)
                said = sock.recv(10_000)
                assert said == b"" or b" 400 " in said.splitlines()[0]
        assert httpx.get(server.url + "/healthz").status_code == 200


def test_browsers_may_call_from_anywhere(stub: Server) -> None:
    asked = {"Origin": "https://x.example", "Access-Control-Request-Headers": "authorization,x-fal-queue-priority"}
    answer = httpx.options(stub.queue, headers=asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]
    assert "PUT" in answer.headers["access-control-allow-methods"]
    assert "x-fal-request-id" in httpx.get(stub.url + "/healthz").headers["access-control-expose-headers"]


def test_operations(stub: Server, client: httpx.Client) -> None:
    client.post(f"{stub.url}/{APP}", json={"prompt": "a"}).raise_for_status()
    told = client.get(stub.url + "/metrics").text
    stage = f'stage_seconds_count{{endpoint="{APP}",stage="denoise"}}'
    for name in ("queue_depth", "queue_wait_seconds_bucket", stage, "requests_ended"):
        assert f"sparsectrl_lcm_{name}" in told
    document = httpx.get(stub.url + "/openapi.json").json()
    assert set(document["paths"]) == {
        f"/{APP}{rest}"
        for rest in ("", "/requests/{request_id}", "/requests/{request_id}/status", "/requests/{request_id}/cancel")
    }
    for line in stub.log.splitlines():
        assert json.loads(line)["message"]
