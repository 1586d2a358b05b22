"""The messages that `process_main.py` sends for a job, as events and results."""

import base64
import logging
from typing import Any

from .interface import Encoding, Event, Job, JobFailed, Made, OnEvent, Preview, Step

log = logging.getLogger(__package__)


def event_of(message: dict[str, Any]) -> Event | Made | JobFailed | None:
    """Returns what a message of `process_main.py` means. The last two end the job."""
    match message:
        case {"say": "step", **values}:
            return Step(**values)
        case {"say": "preview", "index": index, "jpeg": jpeg}:
            return Preview(index, base64.b64decode(jpeg))
        case {"say": "encoding"}:
            return Encoding()
        case {"say": "made", **values}:
            return Made(**values)
        case {"say": "failed", "kind": kind, "message": text, **blame}:
            return JobFailed(kind, text, **blame)
    return None


def notify(job: Job, event: Event, on_event: OnEvent) -> None:
    """Passes an event on to a job's listener, whose errors are logged."""
    try:
        on_event(event)
    except Exception:
        log.exception("The listener of job %s failed", job.id)
