"""What the store holds. Times are seconds since 1970."""

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "running", "done"]
NORMAL, LOW = 0, 1


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request as it is accepted.

    Attributes:
        kind: `run` requests end with the connection that waits for them; `queue` requests outlive it.
        priority: NORMAL or LOW, which waits behind all normal ones.
        start_by: when it is no longer worth starting.
        keep_io: whether input and output may be kept after the end.
        retry: whether it may be tried again when its runner dies.
        object_seconds: lifetime of the clip; None keeps it.
        webhook: where the end is told.
        base_url: scheme and authority of the URLs in the result.
        home: the server that a `run` request's caller is connected to.
    """

    id: str
    key_id: str
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: the HTTP status and body of its result; `error` and `error_type` where it failed."""

    status: int
    body: Any = field(repr=False)
    error: str | None = None
    error_type: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A request and how far it is, but for its input, which may have megabytes.

    Attributes:
        sequence: the order of arrival.
        owner, attempts: who has it in hand, for the how-manieth time; both together name one try.
        crashes: how often its runner died.
    """

    sequence: int
    id: str
    key_id: str
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
class LogRow:
    """A line of a request's log; `labels` are short texts."""

    message: str
    level: str
    created_at: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An API key; the secret itself is nowhere."""

    id: str
    name: str
    secret_hash: str = field(repr=False)
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file that can be fetched under its id and name; its bytes are the object `object_name`."""

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
    """A delivery that is due at `next_at`."""

    request_id: str
    url: str
    host: str
    attempts: int
    next_at: float
