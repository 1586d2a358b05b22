"""Indexes for removing old requests, so that the sweep does not read the whole history each minute."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Creates an index on the end of requests that are kept, and one for those that asked for no storage."""
    for name, sqlite, postgresql in (
        ("kept_requests_by_end", "keep_io = 1", "keep_io"),
        ("private_requests_by_end", "keep_io = 0", "NOT keep_io"),
    ):
        where: dict[str, Any] = {"sqlite_where": sa.text(sqlite), "postgresql_where": sa.text(postgresql)}
        op.create_index(name, "requests", ["finished_at"], **where)
