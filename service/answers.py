"""JSON as every client reads it: ASCII alone, so that no chunk can split a character and no odd string can fail."""

import json
from typing import Any

from starlette.responses import Response

from .errors import headers_of
from .store import Outcome

SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Of server-sent events, which proxies are not to keep back."""
PING_SECONDS, PING = 10.0, b": ping\n\n"
"""After how much silence a stream gets a comment, so that nobody takes it for dead."""


def to_json(value: Any) -> bytes:
    """A value as one line of JSON."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()


class Json(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def answer_of(outcome: Outcome) -> Json:
    """How a request that has ended is answered."""
    return Json(outcome.body, outcome.status, headers_of(outcome.status, outcome.body))
