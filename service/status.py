"""What a status answer says."""

import base64
from datetime import UTC, datetime
from typing import Any

from .board import View
from .store import LogRow

WANTS_LOGS = {"1", "true", "True"}


def urls(base_url: str, endpoint: str, request_id: str) -> dict[str, str]:
    """The URLs that clients follow."""
    response = f"{base_url}/{endpoint}/requests/{request_id}"
    return {"response_url": response, "status_url": f"{response}/status", "cancel_url": f"{response}/cancel"}


def status_of(view: View, links: dict[str, str], position: int, logs_from: int | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and body; with the lines of the log from `logs_from` on, or null for them where it is None."""
    row = view.row
    body: dict[str, Any] = {"status": "IN_QUEUE", "request_id": row.id, **links}
    if row.state == "queued":
        return 202, body | {"queue_position": position}
    body["logs"] = None if logs_from is None else [_line(line) for line in view.logs[logs_from:]]
    if row.outcome is None:
        return 202, body | {"status": "IN_PROGRESS", "metrics": {}}
    body |= {"status": "COMPLETED", "metrics": {}}
    if row.outcome.seconds is not None:
        body["metrics"] = {"inference_time": row.outcome.seconds}
    if row.outcome.error is not None:
        body |= {"error": row.outcome.error, "error_type": row.outcome.error_type}
    return 200, body


def preview_uri(view: View) -> str | None:
    """The picture of a clip that is being made."""
    return None if view.preview is None else "data:image/jpeg;base64," + base64.b64encode(view.preview).decode()


def _line(line: LogRow) -> dict[str, Any]:
    timestamp = datetime.fromtimestamp(line.created_at, UTC).isoformat()
    return {
        "message": line.message,
        "level": line.level,
        "source": "USER",
        "timestamp": timestamp,
        "labels": line.labels,
    }
