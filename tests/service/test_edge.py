"""The HTTP edge around the queue: paths, headers, tokens, logs, readiness, server-sent events."""

import json
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.components import LARGE_BODIES
from sparsectrl_lcm.service.protocol.errors import headers_of

from .conftest import APP, Server, manifest_alone, started
from .holds import Hold
from .waiting import SECONDS, wait_until


@pytest.fixture
def client(stub: Server) -> httpx.Client:
    return httpx.Client(headers=stub.headers(), timeout=30)


def logged(stub: Server) -> None:
    """Waits until all answers so far are in the log: a response is logged after it was sent."""
    mark = f"/{uuid.uuid4().hex}"
    assert httpx.get(f"{stub.url}{mark}").status_code == 404
    wait_until(lambda: mark in stub.log)


def proxied(stub: Server, client: httpx.Client, target: str, method: str = "GET", **options: Any) -> httpx.Response:
    return client.request(method, f"{stub.url}/api/fal/proxy", headers={"x-fal-target-url": target}, **options)


@pytest.mark.parametrize("path", ["/api/fal/proxy", "/queue/api/fal/proxy/", "/api/fal/%70roxy", "//api/fal/proxy/"])
def test_the_proxy_does_not_ask_itself(stub: Server, client: httpx.Client, path: str) -> None:
    for host in ("fal.run", "queue.fal.run"):
        assert proxied(stub, client, f"https://{host}{path}").status_code in (404, 412)


def test_a_target_without_a_path_is_the_page(stub: Server, client: httpx.Client) -> None:
    answer = proxied(stub, client, "https://fal.run")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_a_proxied_request_is_one_request(stub: Server, client: httpx.Client) -> None:
    answer = proxied(stub, client, f"https://queue.fal.run/{APP.replace('-', '%2D')}", "POST", json={"prompt": "a"})
    request_id = answer.json()["request_id"]
    assert answer.headers["x-fal-request-id"] == request_id
    logged(stub)
    lines = [json.loads(line) for line in stub.log.splitlines() if request_id in line]
    (told,) = [line for line in lines if line["message"] == "answered"]
    assert (told["path"], told["status"]) == (f"/{APP}", 200)


def test_the_targets_host_tells_a_run_on_the_queues_port(stub: Server, client: httpx.Client) -> None:
    url = f"http://127.0.0.1:{stub.queue_port}"
    headers = {"x-fal-target-url": f"https://fal.run/{APP}"}
    assert "video" in client.post(f"{url}/api/fal/proxy", headers=headers, json={"prompt": "a"}).json()
    assert "status_url" in client.post(f"{url}/{APP}", json={"prompt": "a"}).json()
    named = {"Host": f"queue.fal.test:{stub.port}"}
    made = client.post(f"{stub.url}/{APP}", headers=named, json={"prompt": "a"}).json()
    assert made["status_url"].startswith(f"http://queue.fal.test:{stub.port}/{APP}/requests/")


@pytest.mark.parametrize("small", [b"{},", b"[],", b"1,", b'"a":0,'])
def test_many_small_values_are_not_parsed(stub: Server, client: httpx.Client, small: bytes) -> None:
    body = b"[" + small * (2**20) + b"0]"
    answer = client.post(stub.queue, content=body)
    assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "too_long")
    prompt = ", ".join("a" * 2000)
    assert client.post(f"{stub.url}/{APP}", json={"prompt": prompt}).status_code == 200


def test_large_bodies_take_turns(stub: Server, client: httpx.Client) -> None:
    body = json.dumps({"prompt": "a", "seed": 5, "more": "x" * 2**20})
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(stub.queue, content=body).status_code))
        for _ in range(3 * LARGE_BODIES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * len(threads)
    assert "video" in client.post(f"{stub.url}/{APP}", content=iter([body.encode()])).json()


def test_outcomes_have_the_same_headers_at_once_and_later(stub: Server, client: httpx.Client, hold: Hold) -> None:
    names = ("x-fal-error-type", "x-fal-billable-units", "x-fal-retryable", "x-fal-request-timeout-type")
    url = "http://127.0.0.1:9/x.png"  # fails only when the request runs
    held = client.post(stub.queue, json={"prompt": hold.prompt}).json()["request_id"]
    for given, extra, status, expected in (
        ({"prompt": "a"}, {"X-Fal-Request-Timeout": "0.2"}, 504, ("startup_timeout", None, None, "user")),
        ({"prompt": "a", "keyframe_0_image_url": url}, {}, 422, ("file_download_error", "0", "false", None)),
        ({"prompt": "fail"}, {}, 500, ("internal_server_error", "0", "true", None)),
    ):
        later = client.post(stub.queue, json=given, headers=extra).json()["response_url"]
        answer = client.post(f"{stub.url}/{APP}", json=given, headers=extra)
        assert (answer.status_code, tuple(answer.headers.get(name) for name in names)) == (status, expected)
        while (asked := client.get(later)).status_code == 400:
            time.sleep(0.05)
        assert (asked.status_code, asked.json()) == (answer.status_code, answer.json())
        assert tuple(asked.headers.get(name) for name in names) == expected
        hold.let_go()  # once the first one has waited in vain
    assert client.get(f"{stub.queue}/requests/{held}").status_code == 200
    gone = {"detail": [{"type": "generation_timeout"}]}
    assert headers_of(504, gone)["X-Fal-Retryable"] == "true"
    assert headers_of(200, {"video": {}, "seed": 1}) == {}


def test_an_index_of_16_is_told_as_fal_does(stub: Server, client: httpx.Client) -> None:
    answer = client.post(f"{stub.url}/{APP}", json={"prompt": "a", "keyframe_2_index": 16, "keyframe_1_index": -1})
    low, high = answer.json()["detail"]
    assert (low["loc"], low["type"], low["ctx"]) == (["body", "keyframe_1_index"], "greater_than_equal", {"ge": 0})
    assert (high["loc"], high["type"], high["ctx"]) == (["body", "keyframe_2_index"], "less_than_equal", {"le": 15})


def test_tokens_for_streams(stub: Server, client: httpx.Client) -> None:
    def token(**about: Any) -> httpx.Response:
        return client.post(f"{stub.url}/tokens/", json=about)

    def streamed(text: str, method: str = "POST", path: str = "/stream") -> int:
        url = f"{stub.url}/{APP}{path}"
        return httpx.request(method, url, params={"fal_jwt_token": text}, json={"prompt": "a"}).status_code

    good = token(allowed_apps=["animatediff-sparsectrl-lcm"], token_expiration=120).json()
    assert streamed(good) == 200
    assert streamed(good, path="") == 401  # the token is for streams only
    assert streamed(good + "x") == streamed("a.b") == streamed("") == 401
    assert streamed(token(allowed_apps=["flux"]).json()) == 403
    short = token(allowed_apps=[APP], token_expiration=0.2).json()
    time.sleep(0.3)
    assert streamed(short) == 401
    for wrong in ({}, {"allowed_apps": "x"}, {"allowed_apps": [APP], "token_expiration": "x"}):
        assert token(**wrong).status_code == 400
    assert httpx.post(f"{stub.url}/tokens/", json={"allowed_apps": [APP]}).status_code == 401


@pytest.mark.parametrize("host", ["169.254.169.254", "10.1.2.3", "[::1]", "2130706433", "0x7f.1", "[::ffff:10.0.0.1]"])
def test_webhooks_to_private_addresses_are_refused_at_once(stub: Server, client: httpx.Client, host: str) -> None:
    answer = client.post(stub.queue, json={"prompt": "a"}, params={"fal_webhook": f"http://{host}/x"})
    if host in ("2130706433", "0x7f.1"):  # 127.0.0.1, which this server allows
        assert answer.status_code == 200
        return
    assert answer.status_code == 400
    assert answer.json() == {"detail": "fal_webhook: its host is not public", "error_type": "bad_request"}


def test_capabilities_are_not_logged(stub: Server, client: httpx.Client) -> None:
    about = {"file_name": "secret-name.png", "content_type": "image/png"}
    made = client.post(f"{stub.url}/storage/upload/initiate", json=about).json()
    httpx.put(made["upload_url"], content=b"abc").raise_for_status()
    assert httpx.get(made["file_url"]).content == b"abc"
    httpx.get(made["file_url"] + "/more/than/that")
    parts = client.post(f"{stub.url}/files/upload/multipart").json()
    client.put(f"{parts['access_url']}/multipart/{parts['uploadId']}/1", content=b"abc").raise_for_status()
    file_id = made["file_url"].split("/files/")[1].split("/")[0]
    logged(stub)
    for hidden in (file_id, "secret-name", made["upload_url"].split("token=")[1], parts["uploadId"]):
        assert hidden not in stub.log
    assert "/files/{file_id}/{file_name}" in stub.log and '"/files/..."' in stub.log


def test_the_document_is_of_its_version(stub: Server, client: httpx.Client) -> None:
    document = client.get(f"{stub.url}/api/openapi/queue/openapi.json", params={"endpoint_id": APP}).json()
    text = json.dumps(document)
    assert '"null"' not in text and "anyOf" not in text and "exclusiveM" not in text
    seed = document["components"]["schemas"]["AnimatediffSparsectrlLcmInput"]["properties"]["seed"]
    assert (seed["type"], seed["nullable"]) == ("integer", True)
    for url in (document["info"]["x-fal-metadata"][name] for name in ("thumbnailUrl", "playgroundUrl")):
        assert httpx.get(url).status_code == 200
    assert document["servers"] == [{"url": f"{stub.url}/queue"}]
    other = client.get(f"{stub.url}/openapi.json", params={"endpoint_id": "fal-ai/flux"})
    assert other.status_code == 404 and "fal-ai/flux" in other.json()["detail"]


def test_readiness_tells_why_not(tmp_path: Path) -> None:
    endpoints = {APP: manifest_alone(tmp_path / "bundle")}
    options = {"pipeline": "stub_pipeline:load", "backend": "broken", "endpoints": endpoints}
    for server in started(tmp_path / "data", **options):
        while (answer := httpx.get(server.url + "/readyz")).json()["status"] == "loading":
            time.sleep(0.05)
        assert answer.status_code == 503
        assert "the stub does not load" in answer.json()["endpoints"][APP]["problem"]


def test_a_server_that_drains_says_so_and_begins_nothing(tmp_path: Path, hold: Hold) -> None:
    for server in started(tmp_path, pipeline="stub_pipeline:load", drain_seconds=SECONDS):
        server.wait()
        with httpx.Client(headers=server.headers(), timeout=30) as client:
            made = client.post(server.queue, json={"prompt": hold.prompt}).json()
            while client.get(made["status_url"]).json()["status"] == "IN_QUEUE":
                time.sleep(0.02)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            while (ready := client.get(server.url + "/readyz")).status_code == 200:
                time.sleep(0.02)
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            for path in ("", "/stream"):
                refused = client.post(f"{server.url}/{APP}{path}", json={"prompt": "a"})
                assert refused.status_code == 503
                assert refused.json()["error_type"] == refused.headers["x-fal-error-type"]
            assert client.get(server.url + "/healthz").status_code == 200
            assert client.post(server.queue, json={"prompt": "a"}).status_code == 200  # kept for the next start
            assert client.put(made["cancel_url"]).status_code == 202  # so that the drain ends
            stopping.join()


def test_a_run_and_a_stream_end_with_their_connections(stub: Server, client: httpx.Client, hold: Hold) -> None:
    def left() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in stub.log.splitlines() if "request ended" in line]
        return [line for line in lines if line["status"] == 499]

    def is_busy() -> bool:
        (runner,) = httpx.get(f"{stub.url}/readyz").json()["endpoints"][APP]["runners"]
        return bool(runner["state"] == "busy")

    def run() -> dict[str, Any]:
        made: dict[str, Any] = client.post(f"{stub.url}/{APP}", json={"prompt": "a"}).json()
        return made

    assert "video" in run()  # after all that still waited
    for path in ("", "/stream"):
        wait_until(lambda: not is_busy())
        before = len(left())
        body = json.dumps({"prompt": hold.prompt}).encode()
        head = f"POST /{APP}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Key {stub.key}\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", stub.port)) as sock:
            sock.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(is_busy)
        assert "video" in run()
        wait_until(lambda before=before: len(left()) > before)
        assert len(left()) == before + 1
