"""Clients of the queue that go on through every failure of the server, as a careful program would."""

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from fakes.marked_pipeline import keyframe

from .supervised_server import SupervisedServer
from .webhook_inbox import Inbox

KINDS = ("poll", "stream", "webhook")
LATER = {429, 502, 503, 504, 507}
"""Statuses of an answer that ask for another attempt later."""
PATIENCE_SECONDS = 300.0


@dataclass
class Accepted:
    """A request whose submission was answered, and what its client saw of it."""

    seed: int
    request_id: str
    kind: str
    ended_at: float = 0.0
    status: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    code: int = 0
    clip: bytes = field(default=b"", repr=False)


@dataclass
class Crowd:
    """`count` clients that submit `share` requests each, at random times within `seconds`."""

    server: SupervisedServer
    key: str
    count: int
    share: int
    seconds: float
    hooks: Inbox
    accepted: list[Accepted] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    """How often a call had to be repeated, by status or error."""
    unexpected: list[str] = field(default_factory=list)
    """Answers that a client must not get, and clients that gave up."""

    def __post_init__(self) -> None:
        self._seeds = itertools.count(1)
        self._threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(self.count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "clients still wait"

    def _client(self, number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        try:
            with self.http() as http:
                for _ in range(self.share):
                    time.sleep(random.uniform(0, 2 * self.seconds / self.share))
                    request = self._submit(http, kind)
                    self._wait(http, request)
                    self._read(http, request)
        except Exception as error:  # told by the test
            self.unexpected.append(f"client {number} ({kind}): {error!r}")

    @contextmanager
    def http(self) -> Iterator[httpx.Client]:
        with httpx.Client(headers={"Authorization": f"Key {self.key}"}, timeout=30) as http:
            yield http

    def _submit(self, http: httpx.Client, kind: str) -> Accepted:
        """Submits until there is an answer. An attempt without one may have been accepted: hence the header."""
        seed = next(self._seeds)
        given = {"prompt": "slow 0.02", "seed": seed, "controlnet_type": "rgb"}
        if kind == "stream":
            given["keyframe_0_image_url"] = keyframe(seed)
        query = {"fal_webhook": self.hooks.url} if kind == "webhook" else {}
        post = partial(http.post, self.server.queue, json=given, params=query, headers={"Idempotency-Key": str(seed)})
        answer = self._repeat("submit", post)
        request = Accepted(seed, answer.json()["request_id"], kind)
        self.accepted.append(request)
        return request

    def _wait(self, http: httpx.Client, request: Accepted) -> None:
        """Waits for the end of a request."""
        url = f"{self.server.queue}/requests/{request.request_id}/status"
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if request.kind == "webhook":
                self.hooks.got.wait(request.request_id, PATIENCE_SECONDS)
            if request.kind == "stream":
                status = self._last_event(http, url + "/stream")
            else:
                status = self._repeat("status", lambda: http.get(url)).json()
            if status.get("status") == "COMPLETED":
                request.ended_at, request.status = time.time(), status
                return
            time.sleep(0.2)
        raise AssertionError(f"{request} is stuck")

    def _last_event(self, http: httpx.Client, url: str) -> dict[str, Any]:
        """Follows a stream until it ends or breaks; returns its last state."""
        last: dict[str, Any] = {}
        try:
            with http.stream("GET", url) as answer:
                if self._is_final("stream", answer):
                    for line in answer.iter_lines():
                        if line.startswith("data: "):
                            last = json.loads(line.removeprefix("data: "))
        except httpx.TransportError as error:
            self._count(type(error).__name__)
        return last

    def _read(self, http: httpx.Client, request: Accepted) -> None:
        """Reads result and clip."""
        url = f"{self.server.queue}/requests/{request.request_id}"
        if "error" in request.status:
            request.code = http.get(url).status_code
            return
        answer = self._repeat("result", lambda: http.get(url))
        request.code, request.result = answer.status_code, answer.json()
        request.clip = self._repeat("clip", lambda: http.get(request.result["video"]["url"])).content

    def read_again(self, http: httpx.Client, request: Accepted) -> tuple[dict[str, Any], bytes]:
        """Returns result and clip as they are now."""
        result = http.get(f"{self.server.queue}/requests/{request.request_id}").raise_for_status().json()
        return result, http.get(result["video"]["url"]).raise_for_status().content

    def _repeat(self, what: str, call: Any) -> httpx.Response:
        """Repeats a call until it is answered with success."""
        end, wait = time.monotonic() + PATIENCE_SECONDS, 0.1
        while time.monotonic() < end:
            after = None
            try:
                answer: httpx.Response = call()
                if self._is_final(what, answer):
                    return answer
                after = answer.headers.get("Retry-After")
            except httpx.TransportError as error:
                self._count(type(error).__name__)
            time.sleep(random.uniform(0.5, 1.0) * wait if after is None else float(after))
            wait = min(2 * wait, 2.0)
        raise AssertionError(f"{what}: no answer for {PATIENCE_SECONDS:g} s")

    def _is_final(self, what: str, answer: httpx.Response) -> bool:
        if answer.is_success:
            return True
        self._count(str(answer.status_code))
        if answer.status_code not in LATER:
            answer.read()
            self.unexpected.append(f"{what}: {answer.status_code} {answer.text[:200]}")
        return False

    def _count(self, what: str) -> None:
        self.refused[what] = self.refused.get(what, 0) + 1
