"""The records of the store. Times are seconds since 1970."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

State = Literal["queued", "running", "done"]
NORMAL, LOW = 0, 1


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A new request.

    Attributes:
        id: identifies the request.
        key_id: the caller's API key.
        endpoint: the endpoint in whose queue it waits.
        input: the fields of the endpoint's input that the caller gave, as JSON values.
        created_at: when it arrived.
        base_url: scheme and authority of the URLs in the result.
        kind: a `run` request ends with the connection that waits for it; a `queue` request outlives it.
        priority: NORMAL or LOW; LOW waits behind all NORMAL ones.
        start_by: time after which the request fails if it has not started.
        keep_io: whether the result may be kept for the usual time.
        retry: whether to try again if the runner dies.
        object_seconds: lifetime of the clip; None keeps it for ever.
        webhook: URL to call at the end.
        home: for `run`, the server that the caller is connected to.
        idempotency_key: the caller's name of this submission; a repeated one gets the first request.
        fingerprint: hash of the input as the caller gave it, to tell a repeated submission from another.
    """

    id: str
    key_id: str
    endpoint: str
    input: dict[str, Any] = field(repr=False)
    created_at: float
    base_url: str
    kind: Literal["queue", "run"] = "queue"
    priority: int = NORMAL
    start_by: float | None = None
    keep_io: bool = True
    retry: bool = True
    object_seconds: float | None = None
    webhook: str | None = None
    home: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submission that was accepted.

    Attributes:
        id: of its request; for a repeated submission, that of the first.
        key_id: the caller's API key.
        ahead: how many requests wait ahead of it.
        is_new: whether it was not repeated.
    """

    id: str
    key_id: str
    ahead: int
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended.

    Attributes:
        status: HTTP status of its result.
        body: JSON body of its result.
        error: one line, if it failed.
        error_type: fal's name of the error, if it failed.
        seconds: time that the runner took, if it made the clip.
        frames: of the clip, if it was made.
    """

    status: int
    body: Any = field(repr=False)
    error: str | None = None
    error_type: str | None = None
    seconds: float | None = None
    frames: int | None = None


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A request and its state, without the input, which may take megabytes.

    Attributes:
        sequence: the order of arrival.
        owner: the server that runs it.
        attempts: number of the current attempt, from 1; owner and number together name one attempt.
        crashes: how often the runner died during an attempt.
    """

    sequence: int
    id: str
    key_id: str
    endpoint: str
    kind: str
    state: State
    priority: int
    created_at: float
    start_by: float | None
    started_at: float | None
    finished_at: float | None
    keep_io: bool
    retry: bool
    object_seconds: float | None
    webhook: str | None
    base_url: str
    owner: str | None
    attempts: int
    crashes: int
    cancelled: bool
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a request's state other than its submission, claim or result: cancelled, expired, or waiting again.

    Attributes:
        id: of the request.
        endpoint: its endpoint.
        status: the HTTP status with which it ended; None if it has not.
    """

    id: str
    endpoint: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class LogRow:
    """A line of a request's log, with short labels."""

    message: str
    level: str
    created_at: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An API key. Only the hash of its secret is stored."""

    id: str
    name: str
    secret_hash: str = field(repr=False)
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file, fetched by id and name. Its bytes are the object `object_name`. None as `expires_at` means never."""

    id: str
    key_id: str
    name: str
    content_type: str
    size: int
    object_name: str
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class WebhookRow:
    """A webhook to deliver. `attempt` is the number of this attempt, from 1."""

    request_id: str
    key_id: str
    url: str
    host: str
    attempt: int


def values_of(source: Any, kind: type) -> dict[str, Any]:
    """Returns the fields of a kind of record with their values in a record, or in a row that has them as columns."""
    return {each.name: getattr(source, each.name) for each in fields(kind)}
