"""The tables of the newest schema. JSON is stored as ASCII text, so that every database accepts what any client sent.

Each change here needs a new file in `migrations`, which makes the same change to databases that exist.
"""

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

from ..settings import DEFAULT_ENDPOINT


def to_text(value: Any) -> str:
    """Returns a value as JSON in ASCII."""
    return json.dumps(value, separators=(",", ":"))


class Json(TypeDecorator[Any]):
    """A value as JSON text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        """Converts a value for the database."""
        return None if value is None else to_text(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        """Converts a value from the database."""
        return None if value is None else json.loads(value)


Counter = BigInteger().with_variant(Integer, "sqlite")  # SQLite assigns row numbers only to an INTEGER key
metadata = MetaData()

requests = Table(
    "requests",
    metadata,
    Column("sequence", Counter, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("key_id", String(64), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("input", Json),
    Column("state", String(8), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("start_by", Float(53)),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
    Column("keep_io", Boolean, nullable=False),
    Column("retry", Boolean, nullable=False),
    Column("object_seconds", Float(53)),
    Column("webhook", Text),
    Column("base_url", Text, nullable=False),
    Column("home", String(64)),
    Column("owner", String(64)),
    Column("lease_until", Float(53)),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("cancelled", Boolean, nullable=False),
    Column("status", Integer),
    Column("body", Json),
    Column("error", Text),
    Column("error_type", String(64)),
    Column("seconds", Float(53)),
    Column("turn", BigInteger, nullable=False, server_default="0"),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64)),
    Column("input_bytes", BigInteger),  # null if the input is
    Column("endpoint", String(255), nullable=False, server_default=DEFAULT_ENDPOINT),
    Column("frames", Integer),
    Index("requests_in_order", "state", "endpoint", "priority", "turn", "sequence"),
    Index("requests_of_key", "key_id", "state", "endpoint", "priority", "turn"),
    sqlite_autoincrement=True,
)
unstarted = (requests.c.state == "done") & requests.c.started_at.is_(None)
Index(
    "requests_that_never_started",
    requests.c.key_id,
    requests.c.created_at,
    sqlite_where=unstarted,
    postgresql_where=unstarted,
)
_made = requests.c.status == 200
Index("clips_of_key", requests.c.key_id, requests.c.sequence, sqlite_where=_made, postgresql_where=_made)
_repeatable = requests.c.idempotency_key.is_not(None)
Index(
    "requests_by_idempotency_key",
    requests.c.key_id,
    requests.c.endpoint,
    requests.c.idempotency_key,
    unique=True,
    sqlite_where=_repeatable,
    postgresql_where=_repeatable,
)
for _name, _kind in (("kept", requests.c.keep_io), ("private", ~requests.c.keep_io)):  # for removing old requests
    Index(f"{_name}_requests_by_end", requests.c.finished_at, sqlite_where=_kind, postgresql_where=_kind)
_kept = requests.c.input_bytes.is_not(None)
Index("inputs_of_key", requests.c.key_id, requests.c.input_bytes, sqlite_where=_kept, postgresql_where=_kept)

logs = Table(
    "logs",
    metadata,
    Column("number", Counter, primary_key=True, autoincrement=True),
    Column("request_id", String(64), nullable=False, index=True),
    Column("message", Text, nullable=False),
    Column("level", String(8), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("labels", Json, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("revoked_at", Float(53)),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("object_name", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53), index=True),
    Index("files_of_key", "key_id", "size"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("url", Text, nullable=False),
    Column("host", String(255), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Float(53), index=True),  # null after delivery, or after the last attempt
    Column("last_error", Text),
    Column("key_id", String(64), nullable=False, server_default=""),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)
