"""What no route expects: bytes that are no text, errors of a middleware, a process without file descriptors."""

import asyncio
import json
import resource
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings

from .conftest import APP, Server
from .stand_in import StandIn
from .waiting import wait_until


@pytest.mark.parametrize(
    ("target", "expected"),
    [(b"x?\xff", 400), (b"\xff\xfe", 400), ("ä?ü".encode(), 400), (b"x%FF?%FF", 404), (b"\xed\xa0\x80?x", 400)],
)
def test_bytes_of_a_target_that_are_no_text(stub: Server, target: bytes, expected: int) -> None:
    url = b"https://queue.fal.run/" + target
    answer = httpx.get(f"{stub.url}/api/fal/proxy", headers=[(b"x-fal-target-url", url)])
    assert (answer.status_code, list(answer.json())) == (expected, ["detail"])


def test_a_lone_surrogate_in_a_data_uri_is_told_as_wrong_input(stub: Server) -> None:
    for uri in ("data:image/png;base64,\ud800", "data:image/png,\udfff", "data:\ud800,"):
        body = json.dumps({"prompt": "a", "keyframe_0_image_url": uri})
        answer = httpx.post(f"{stub.url}/{APP}", headers=stub.headers(), content=body)
        assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "string_unicode")


async def _answer(service: Any, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.get(path)


def test_an_error_anywhere_is_told_as_fal_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = open_service(Settings(tmp_path, anonymous=True), StandIn())

    def fail(*_: Any) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(type(service.board), "known", fail)  # a middleware asks it, and routes do
    try:
        answer = asyncio.run(_answer(service, f"/{APP}/requests/abc/status"))
    finally:
        service.store.close()
    assert answer.status_code == 500
    assert answer.json() == {"detail": "Internal Server Error", "error_type": "internal_error"}
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["x-fal-request-id"] == "abc"


def test_an_error_of_a_route_is_logged_as_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = open_service(Settings(tmp_path, anonymous=True), StandIn())
    monkeypatch.setattr(type(service.board), "view", None)
    with caplog.at_level("INFO"):
        assert asyncio.run(_answer(service, f"/{APP}/requests/abc")).status_code == 500
    service.store.close()
    assert [vars(record)["status"] for record in caplog.records if record.getMessage() == "answered"] == [500]


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_without_descriptors_the_log_does_not_grow(stub: Server) -> None:
    assert stub.process is not None
    pid, before = stub.process.pid, len(stub.log)
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 10, usual[1]))
    try:
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection(("127.0.0.1", stub.port)))
            wait_until(lambda: "no connection is accepted" in stub.log[before:])
            time.sleep(2.5)  # meanwhile it tries again
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    wait_until(lambda: b" 200 " in _line(stub.port))
    lines = [json.loads(line)["message"] for line in stub.log[before:].splitlines()]
    assert sum("no connection is accepted" in line for line in lines) == 1
    assert len(stub.log) - before < 10_000


def _line(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return sock.makefile("rb").readline()
