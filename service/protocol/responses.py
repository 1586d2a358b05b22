"""Responses that every client can read: JSON in pure ASCII, so that no chunk splits a character and no string fails."""

import json
from typing import Any

from starlette.responses import Response

from ..store import Outcome
from .errors import headers_of

EVENT_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers of server-sent events. They keep proxies from buffering the events."""
PING_SECONDS, PING = 10.0, b": ping\n\n"
"""Seconds of silence after which a stream sends a comment, so that nobody takes it for dead; and the comment."""


def to_json(value: Any) -> bytes:
    """Returns a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()


def to_event(value: Any) -> bytes:
    """Returns a value as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Json(Response):
    """A response in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        return to_json(content)


def outcome_response(outcome: Outcome) -> Json:
    """Returns the response for a request that has ended."""
    return Json(outcome.body, outcome.status, headers_of(outcome.status, outcome.body))
