"""Single requests in SQL: reading, locking and ending their rows within a transaction of the store."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, Connection, bindparam, delete, insert, or_, select, update

from . import tables
from .records import FileRow, LogRow, Outcome, RequestRow, values_of

requests, logs, webhooks, files = tables.requests, tables.logs, tables.webhooks, tables.files
waiting = requests.c.state == "queued"
running = requests.c.state == "running"
SHOWN = tuple(column for column in requests.c if column.name != "input")
"""The columns of a request except its input, which may take megabytes."""

ATTEMPTS = 10
"""Most attempts at a request. A request that kills its server would otherwise do so for ever."""
CANCELLED = 499
"""The status of a request that was cancelled."""
REVOKED = 401
"""The status of a request whose API key was revoked while it waited."""

# What runs for each clip is built once: SQLAlchemy takes longer to build a statement than SQLite to run it.
given_request = requests.c.id == bindparam("request_id")
"""Condition: the request with the given id."""
current_attempt = (
    given_request & running & (requests.c.owner == bindparam("by")) & (requests.c.attempts == bindparam("attempt"))
)
"""Condition: the request with the given id, if the given attempt is still its current one. See `attempt_of`."""
_END = update(requests).where(given_request)
_END_CURRENT = _END.where(current_attempt, ~requests.c.cancelled)
_LOCK_CURRENT = select(*SHOWN).where(current_attempt).with_for_update()
_UPDATE_FILE = update(files).where(files.c.id == bindparam("file_id"))
_DELETE_FILE = delete(files).where(files.c.id == bindparam("file_id"))


def attempt_of(row: RequestRow) -> dict[str, Any]:
    """Returns the parameters of `current_attempt` for an attempt."""
    return {"request_id": row.id, "by": row.owner, "attempt": row.attempts}


def in_time(now: float | ColumnElement[float]) -> ColumnElement[bool]:
    """Returns the condition that a request may still be started."""
    return or_(requests.c.start_by.is_(None), requests.c.start_by > now)


def lock_attempt(connection: Connection, row: RequestRow) -> Any:
    """Returns the row of an attempt, locked until the transaction ends; None if the attempt is no longer current."""
    return connection.execute(_LOCK_CURRENT, attempt_of(row)).one_or_none()


def read_logs(connection: Connection, request_id: str) -> list[LogRow]:
    """Returns the log of a request."""
    query = select(logs).where(logs.c.request_id == request_id).order_by(logs.c.number)
    return [LogRow(row.message, row.level, row.created_at, row.labels) for row in connection.execute(query)]


def read_made(connection: Connection, key_id: str, limit: int) -> list[RequestRow]:
    """Returns the last requests of a key whose clips were made and may be kept, newest first."""
    made = (requests.c.key_id == key_id) & (requests.c.status == 200)  # as the index says it
    query = select(*SHOWN).where(made, requests.c.keep_io).order_by(requests.c.sequence.desc()).limit(limit)
    return [to_request(row) for row in connection.execute(query)]


def add_logs(connection: Connection, request_id: str, lines: Sequence[LogRow]) -> None:
    """Adds lines to the log of a request."""
    rows = [{"request_id": request_id} | values_of(line, LogRow) for line in lines]
    if rows:
        connection.execute(insert(logs), rows)


def announce_clip(connection: Connection, clip: FileRow) -> None:
    """Records a clip before it is made, so that no crash leaves its bytes without a record."""
    connection.execute(insert(files), values_of(clip, FileRow))


def end_clip(connection: Connection, clip: FileRow | None, expires_at: float | None, *, keep: bool = False) -> None:
    """Updates the record of a clip at the end of an attempt. One that was not stored has no size: its record goes.

    A stored clip gets its lifetime if it is to be kept. Otherwise its bytes go with the record, within a day. `clip` is
    None if nobody knows whether it was stored: then too its record stays as it was announced.
    """
    if clip is None:
        return
    if not clip.size:
        connection.execute(_DELETE_FILE, {"file_id": clip.id})
    elif keep:
        values = values_of(clip, FileRow) | {"expires_at": expires_at}
        if not connection.execute(_UPDATE_FILE, values | {"file_id": clip.id}).rowcount:
            connection.execute(insert(files), values)  # it was stored so late that its record had expired


def wait_again(connection: Connection, row: Any, now: float, crashes: int | None = None) -> int | None:
    """Puts a running request back into the queue, or ends it and returns its status."""
    if row.cancelled or row.attempts >= ATTEMPTS:
        often = failure(500, f"The clip was begun {row.attempts} times and never made", "runner_server_error")
        outcome = cancellation("client_cancelled") if row.cancelled else often
        end_request(connection, row.id, row.webhook, outcome, now)
        return outcome.status
    values: dict[str, Any] = {"state": "queued", "owner": None, "lease_until": None, "started_at": None}
    values["start_by"] = None  # its first start was in time
    values["crashes"] = row.crashes if crashes is None else crashes
    connection.execute(update(requests).where(requests.c.id == row.id).values(values))
    return None


def failure(status: int, detail: str, error_type: str) -> Outcome:
    """Returns the outcome of a request that failed without the model."""
    return Outcome(status, {"detail": detail, "error_type": error_type}, detail, error_type)


def cancellation(reason: str) -> Outcome:
    """Returns the outcome of a request that was cancelled."""
    return failure(CANCELLED, "Request was cancelled", reason)


def end_request(
    connection: Connection,
    request_id: str,
    webhook: str | None,
    outcome: Outcome,
    now: float,
    attempt: RequestRow | None = None,
) -> bool:
    """Ends a request and deletes its input, which is no longer needed.

    Returns False if `attempt` is given and is no longer the current one, or was cancelled.
    """
    values = values_of(outcome, Outcome)
    values |= {"state": "done", "owner": None, "lease_until": None, "finished_at": now}
    values |= {"input": None, "input_bytes": None}
    statement, which = _END, {"request_id": request_id}
    if attempt is not None:
        statement, which = _END_CURRENT, attempt_of(attempt)
    if not connection.execute(statement, values | which).rowcount:
        return False
    if webhook is not None:
        host = (urlsplit(webhook).hostname or "")[:255]
        due = {"request_id": request_id, "url": webhook, "host": host, "attempts": 0, "next_at": now}
        key_id = select(requests.c.key_id).where(requests.c.id == request_id).scalar_subquery()
        connection.execute(insert(webhooks).values(due | {"key_id": key_id}))
    return True


def to_request(row: Any) -> RequestRow:
    """Returns the record of a row with the columns `SHOWN`."""
    values = {name: getattr(row, name) for name in RequestRow.__dataclass_fields__ if name != "outcome"}
    outcome = Outcome(**values_of(row, Outcome)) if row.state == "done" else None
    return RequestRow(**values, outcome=outcome)
