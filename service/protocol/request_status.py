"""The body of a status response."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ..store import LogRow, RequestRow

WANTS_LOGS = {"1", "true", "True"}
"""Values of the query parameter `logs` that ask for the log."""


def status_of(
    row: RequestRow, logs: Sequence[LogRow], links: dict[str, str], position: int, logs_from: int | None
) -> tuple[int, dict[str, Any]]:
    """Describes the state of a request.

    Args:
        row: the request.
        logs: its log.
        links: its URLs, as `request_urls` gives them.
        position: how many requests wait ahead of it.
        logs_from: first line of the log to include; None leaves the log out.

    Returns:
        HTTP status and body.
    """
    body: dict[str, Any] = {"status": "IN_QUEUE", "request_id": row.id, **links}
    if row.state == "queued":
        return 202, body | {"queue_position": position}
    body["logs"] = None if logs_from is None else [_line(line) for line in logs[logs_from:]]
    if row.outcome is None:
        return 202, body | {"status": "IN_PROGRESS", "metrics": {}}
    body |= {"status": "COMPLETED", "metrics": {}}
    if row.outcome.seconds is not None:
        body["metrics"] = {"inference_time": row.outcome.seconds}
    if row.outcome.error is not None:
        body |= {"error": row.outcome.error, "error_type": row.outcome.error_type}
    return 200, body


def preview_uri(preview: bytes) -> str:
    """Returns a preview (a JPEG) as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(preview).decode()


def _line(line: LogRow) -> dict[str, Any]:
    timestamp = datetime.fromtimestamp(line.created_at, UTC).isoformat()
    return {
        "message": line.message,
        "level": line.level,
        "source": "USER",
        "timestamp": timestamp,
        "labels": line.labels,
    }
