"""A receiver of webhooks that keeps them by request, and lets clients wait for theirs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .test_webhooks import Receiver


class Got:
    """The webhooks that arrived: request id -> headers and body of each delivery."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[dict[str, str], bytes]]] = {}
        self._changed = threading.Condition()

    def append(self, delivery: tuple[dict[str, str], bytes]) -> None:
        with self._changed:
            self.of.setdefault(json.loads(delivery[1])["request_id"], []).append(delivery)
            self._changed.notify_all()

    def wait(self, request_id: str, seconds: float) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: request_id in self.of, seconds), f"no webhook of {request_id}"


class Inbox(Receiver):
    def __init__(self) -> None:
        super().__init__()
        self.got: Any = Got()


@contextmanager
def inbox() -> Iterator[Inbox]:
    receiver = Inbox()
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    yield receiver
    receiver.shutdown()
    receiver.server_close()
