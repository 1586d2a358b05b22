"""The first schema. Databases from before versions were recorded have it, too."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_TIME = sa.Float(53)


def upgrade() -> None:
    """Creates all tables."""
    _requests()
    op.create_table(
        "logs",
        sa.Column("number", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
    )
    op.create_index("ix_logs_request_id", "logs", ["request_id"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("revoked_at", _TIME),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("content_type", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("object_name", sa.Text, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME),
    )
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_table(
        "webhooks",
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", _TIME),
        sa.Column("last_error", sa.Text),
    )
    op.create_index("ix_webhooks_next_at", "webhooks", ["next_at"])
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("sequence", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("input", sa.Text),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("start_by", _TIME),
        sa.Column("started_at", _TIME),
        sa.Column("finished_at", _TIME),
        sa.Column("keep_io", sa.Boolean, nullable=False),
        sa.Column("retry", sa.Boolean, nullable=False),
        sa.Column("object_seconds", _TIME),
        sa.Column("webhook", sa.Text),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("home", sa.String(64)),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease_until", _TIME),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("cancelled", sa.Boolean, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("body", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("error_type", sa.String(64)),
        sa.Column("seconds", _TIME),
        sqlite_autoincrement=True,
    )
    op.create_index("requests_in_order", "requests", ["state", "priority", "sequence"])
    op.create_index("requests_of_key", "requests", ["key_id", "state"])
    unstarted = sa.text("state = 'done' AND started_at IS NULL")
    columns = ["key_id", "created_at"]
    op.create_index(
        "requests_that_never_started", "requests", columns, sqlite_where=unstarted, postgresql_where=unstarted
    )
