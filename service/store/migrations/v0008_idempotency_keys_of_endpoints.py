"""Idempotency keys of each endpoint, so that a client may give two endpoints the same one."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Puts the endpoint into the index."""
    name = "requests_by_idempotency_key"
    op.drop_index(name, "requests")
    given = sa.text("idempotency_key IS NOT NULL")
    columns = ["key_id", "endpoint", "idempotency_key"]
    op.create_index(name, "requests", columns, unique=True, sqlite_where=given, postgresql_where=given)
