"""Webhooks as receivers see them: delivered after the end of a request, signed and retried."""

import asyncio
import base64
import hashlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.auth.webhook_signatures import Signer
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.network import webhook_delivery
from sparsectrl_lcm.service.network.webhook_delivery import Webhooks
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import NewRequest, Outcome
from sqlalchemy.exc import OperationalError

from .conftest import APP, Server, started
from .stand_in import until
from .waiting import SECONDS, wait_until


class Receiver(ThreadingHTTPServer):
    """Refuses the first delivery of each request, and records all."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.refuse = 0
        self.answers = threading.Event()
        """Cleared, it gets requests and answers none."""
        self.answers.set()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}/hook?a=b%20c"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        receiver: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        receiver.refuse -= 1
        receiver.answers.wait(SECONDS)
        self.send_response(500 if receiver.refuse >= 0 else 204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_delivery, "TICK_SECONDS", 0.05)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    yield from receiving()


def receiving() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def delivered(receiver: Receiver, count: int) -> list[tuple[dict[str, str], bytes]]:
    wait_until(lambda: len(receiver.got) >= count)
    assert len(receiver.got) == count
    return receiver.got


def verify(headers: dict[str, str], body: bytes, jwks: dict[str, Any]) -> None:
    """Verifies the signature with every key, as fal documents it for Python. One key has to have base64 padding."""
    assert abs(int(headers["x-fal-webhook-timestamp"]) - time.time()) < 300
    names = ("x-fal-webhook-request-id", "x-fal-webhook-user-id", "x-fal-webhook-timestamp")
    message = "\n".join([*(headers[name] for name in names), hashlib.sha256(body).hexdigest()]).encode()
    for key in jwks["keys"]:
        public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "=" * (-len(key["x"]) % 4)))
        public.verify(bytes.fromhex(headers["x-fal-webhook-signature"]), message)
    assert any(len(base64.urlsafe_b64decode(key["x"])) == 32 for key in jwks["keys"] if key["x"].endswith("="))


def test_success_and_failure_are_told_and_signed(stub: Server, receiver: Receiver) -> None:
    published = httpx.get(stub.url + "/.well-known/jwks.json")
    assert published.headers["Cache-Control"] == "public, max-age=3600"
    jwks = published.json()
    receiver.refuse = 1
    with httpx.Client(headers=stub.headers()) as client:
        given = {"prompt": "a", "seed": 9}
        first = client.post(stub.queue, json=given, params={"fal_webhook": receiver.url}).json()["request_id"]
        (_, refused), (headers, body) = delivered(receiver, 2)
        assert refused == body
        verify(headers, body, jwks)
        told = json.loads(body)
        assert (told["request_id"], told["status"], told["payload"]["seed"]) == (first, "OK", 9)
        client.post(stub.queue, json={"prompt": 1}, params={"fal_webhook": receiver.url})
        headers, body = delivered(receiver, 3)[2]
        verify(headers, body, jwks)
        told = json.loads(body)
        assert (told["status"], told["error"]) == ("ERROR", "Invalid status code: 422")
        assert told["payload"]["detail"][0]["loc"] == ["body", "prompt"]


def test_a_slow_receiver_delays_no_other(tmp_path: Path) -> None:
    slow, fast = Receiver(), Receiver("127.0.0.2")
    slow.answers.clear()
    for one in (slow, fast):
        threading.Thread(target=one.serve_forever, daemon=True).start()
    for server in started(
        tmp_path, pipeline="stub_pipeline:load", allow_private=["127.0.0.0/8"], webhook_seconds=SECONDS
    ):
        with httpx.Client(headers=server.headers()) as client:
            for _ in range(30):
                client.post(server.queue, json={}, params={"fal_webhook": slow.url}).raise_for_status()
            for _ in range(10):
                client.post(server.queue, json={}, params={"fal_webhook": fast.url}).raise_for_status()
            delivered(fast, 10)
            assert len(slow.got) < 30
            slow.answers.set()
    for one in (slow, fast):
        one.shutdown()
        one.server_close()


def test_whatever_a_receiver_does_is_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(clock, "now", lambda: now)

    class Odd:
        def stream(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("odd")

    async def scenario() -> None:
        service = open_service(Settings(tmp_path, pipeline="stub_pipeline:load"))
        request = NewRequest("a", "k", APP, {}, 1.0, "http://x", webhook="http://h/")
        service.store.submit(request, limit=9, key_limit=9, outcome=Outcome(422, {}, "x"))
        (row,) = service.store.due_webhooks(now, 60.0)
        client: Any = Odd()
        await Webhooks(service)._one(client, row)
        assert service.store.due_webhooks(now, 60.0) == []
        (row,) = service.store.due_webhooks(now + 5, 60.0)
        assert row.attempt == 2
        service.store.close()

    asyncio.run(scenario())


def test_the_known_vector() -> None:
    body = (
        b'{"request_id":"123e4567-e89b-12d3-a456-426614174000",'
        b'"gateway_request_id":"123e4567-e89b-12d3-a456-426614174000","status":"OK","payload":{"seed":42}}'
    )
    signer = Signer(bytes(range(32)))
    headers = signer.headers("123e4567-e89b-12d3-a456-426614174000", "user-1", body, 1700000000)
    assert headers["X-Fal-Webhook-Signature"] == (
        "bda89268ae24886f3a6e4811a992c7b31d529f9b9fabc53e4c74b4cb181cb406"
        "b415c16e387c43207c580548f93ab5bf2a72bb5214eabf5e02db7e0ba0be0700"
    )
    assert signer.jwks()["keys"][0]["x"] == "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"


async def nothing() -> None: ...


def deliver(
    folder: Path,
    receiver: Receiver,
    prepare: Callable[[Service], None],
    meanwhile: Callable[[], Awaitable[None]] = nothing,
) -> list[str]:
    """Delivers the webhook of one request, and goes on for a while. Returns the number in each delivery's header."""

    async def scenario() -> None:
        settings = Settings(folder, pipeline="stub_pipeline:load", allow_private=("127.0.0.1",))
        service = open_service(settings)
        request = NewRequest("a", "k", APP, {}, 1.0, "http://x", webhook=receiver.url)
        service.store.submit(request, limit=9, key_limit=9, outcome=Outcome(200, {}))
        prepare(service)
        webhooks = Webhooks(service)
        await webhooks.start()
        await asyncio.to_thread(delivered, receiver, 1)
        await meanwhile()
        await asyncio.sleep(10 * webhook_delivery.TICK_SECONDS)
        await webhooks.stop()
        service.store.close()

    asyncio.run(scenario())
    return [headers["x-webhook-attempt"] for headers, _ in receiver.got]


@pytest.mark.usefixtures("_often")
def test_a_delivery_that_cannot_be_recorded_is_not_repeated(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_delivery, "RECORD_SECONDS", 0.05)
    works, recorded, now = threading.Event(), threading.Event(), clock.now

    def prepare(service: Service) -> None:
        write = service.store.webhook_tried

        def fails(*given: Any) -> None:
            if not works.is_set():
                raise OperationalError("UPDATE", {}, Exception("the database system is shutting down"))
            write(*given)
            recorded.set()

        monkeypatch.setattr(service.store, "webhook_tried", fails)
        monkeypatch.setattr(service.store.outage, "begin", lambda *_, **__: None)  # the other calls succeed

    async def meanwhile() -> None:
        monkeypatch.setattr(clock, "now", lambda: now() + 10_000)  # when it would be due again
        await asyncio.sleep(10 * webhook_delivery.TICK_SECONDS)
        works.set()
        await until(recorded.is_set)

    assert deliver(tmp_path, receiver, prepare, meanwhile) == ["1"]


@pytest.mark.usefixtures("_often")
def test_a_delivery_that_may_be_a_repetition_says_so(tmp_path: Path, receiver: Receiver) -> None:
    def prepare(service: Service) -> None:
        assert service.store.due_webhooks(time.time(), 0.0)  # by a process that was killed

    assert deliver(tmp_path, receiver, prepare) == ["2"]
