"""When a webhook is delivered again, and when never again. Receivers are real servers."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.network.webhook_delivery import Webhooks
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import NewRequest, Outcome

from .conftest import APP
from .waiting import SECONDS

ENOUGH = 6
"""More attempts than any case allows."""


@contextmanager
def receiver(status: int) -> Iterator[ThreadingHTTPServer]:
    """A server that answers every POST with one status, a redirect to itself; `paths` are those that were called."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    paths: list[str] = []
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths = paths
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def attempts(folder: Path, url: str, **settings: Any) -> list[tuple[str | None, float | None]]:
    """Delivers a webhook without its waits; returns the error of each attempt and the seconds to the next, or None."""
    tried: list[tuple[str | None, float | None]] = []
    now = time.time()

    async def deliver() -> None:
        service = open_service(Settings(folder, pipeline="stub_pipeline:load", webhook_seconds=SECONDS, **settings))
        store: Any = service.store
        record, ended = store.webhook_tried, asyncio.Event()
        loop = asyncio.get_running_loop()

        def webhook_tried(request_id: str, error: str | None, next_at: float | None) -> None:
            tried.append((error, None if next_at is None else next_at - now))
            record(request_id, error, None if next_at is None else now)
            if next_at is None or len(tried) == ENOUGH:
                loop.call_soon_threadsafe(ended.set)

        store.webhook_tried = webhook_tried
        request = NewRequest("a", "k", APP, {}, 1.0, "http://x", webhook=url)
        store.submit(request, limit=9, key_limit=9, outcome=Outcome(422, {}, "x"))
        webhooks = Webhooks(service)
        await webhooks.start()
        async with asyncio.timeout(SECONDS):
            await ended.wait()
        await webhooks.stop()
        store.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "now", lambda: now)
        asyncio.run(deliver())
    return tried


def test_attempts_are_limited_and_their_waits_double(tmp_path: Path) -> None:
    """The waits are spread by a fifth, and bounded."""
    with receiver(500) as server:
        url = f"http://127.0.0.1:{server.server_port}/hook"
        options = {"webhook_attempts": 5, "webhook_wait_seconds": 4.0, "allow_private": ("127.0.0.1",)}
        tried = attempts(tmp_path, url, **options)
        assert server.paths == ["/hook"] * 5  # type: ignore[attr-defined]
    assert [error for error, _ in tried] == ["HTTP 500"] * 5
    waits = [wait for _, wait in tried]
    assert waits[4] is None
    for wait, usual in zip(waits, (1, 2, 4, 4), strict=False):
        assert wait is not None and 0.79 * usual <= wait <= 1.21 * usual


def test_a_redirect_is_neither_followed_nor_tried_again(tmp_path: Path) -> None:
    for status in (302, 307):
        with receiver(status) as server:
            url = f"http://127.0.0.1:{server.server_port}/hook"
            tried = attempts(tmp_path / str(status), url, allow_private=("127.0.0.1",))
            assert server.paths == ["/hook"]  # type: ignore[attr-defined]
        assert tried == [(f"HTTP {status}", None)]


@pytest.mark.parametrize("allowed", [(), ("10.0.0.0/8", "another.example")])
def test_a_name_that_leads_to_a_private_address_is_refused_once(tmp_path: Path, allowed: tuple[str, ...]) -> None:
    with receiver(204) as server:
        tried = attempts(tmp_path, f"http://localhost:{server.server_port}/hook", allow_private=allowed)
        assert server.paths == []  # type: ignore[attr-defined]
    assert tried == [("AddressRefused", None)]


def test_an_allowed_name_is_reached(tmp_path: Path) -> None:
    with receiver(204) as server:
        url = f"http://localhost:{server.server_port}/hook"
        assert attempts(tmp_path, url, allow_private=("localhost",)) == [(None, None)]
        assert server.paths == ["/hook"]  # type: ignore[attr-defined]
