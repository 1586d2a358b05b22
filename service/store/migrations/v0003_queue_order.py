"""The turns of requests between API keys, and the keys with which a client repeats a submission."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the columns. Requests that wait already keep their order."""
    op.add_column("requests", sa.Column("turn", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("requests", sa.Column("idempotency_key", sa.String(255)))
    op.add_column("requests", sa.Column("fingerprint", sa.String(64)))
    for name, columns in (
        ("requests_in_order", ["state", "priority", "turn", "sequence"]),
        ("requests_of_key", ["key_id", "state", "priority", "turn"]),
    ):
        op.drop_index(name, "requests")
        op.create_index(name, "requests", columns)
    given = sa.text("idempotency_key IS NOT NULL")
    columns = ["key_id", "idempotency_key"]
    op.create_index(
        "requests_by_idempotency_key", "requests", columns, unique=True, sqlite_where=given, postgresql_where=given
    )
