"""The logs of the server: one JSON object per line."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_fields: ContextVar[Mapping[str, str]] = ContextVar("fields", default={})  # noqa: B039  never changed


@contextmanager
def logs_of(**fields: str) -> Iterator[None]:
    """Adds fields, such as the endpoint's name, to what the block and the tasks that begin in it log."""
    before = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(before)


class JsonLines(logging.Formatter):
    """Writes a record as JSON: time, level, logger, message, the fields of `logs_of`, and those given as `extra`.

    Ray adds its own fields.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields.get()
        line |= {name: value for name, value in vars(record).items() if name not in PLAIN and not name.startswith("_")}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: str) -> None:
    """Sends the logs of the service, and warnings of all libraries, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("sparsectrl_lcm").setLevel(level.upper())
