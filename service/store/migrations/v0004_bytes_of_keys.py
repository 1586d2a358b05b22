"""The size of inputs, and indexes over the bytes that are stored for a key."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the size of an input to its request, and the two indexes."""
    op.add_column("requests", sa.Column("input_bytes", sa.BigInteger))
    op.execute("UPDATE requests SET input_bytes = length(input) WHERE input IS NOT NULL")
    where = sa.text("input_bytes IS NOT NULL")
    op.create_index("inputs_of_key", "requests", ["key_id", "input_bytes"], sqlite_where=where, postgresql_where=where)
    op.create_index("files_of_key", "files", ["key_id", "size"])
