"""The endpoint of each request, so that servers with different bundles share a database."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds the column and puts it into the indexes of the queue."""
    name = "fal-ai/animatediff-sparsectrl-lcm"
    op.add_column("requests", sa.Column("endpoint", sa.String(255), nullable=False, server_default=name))
    for index, columns in (
        ("requests_in_order", ["state", "endpoint", "priority", "turn", "sequence"]),
        ("requests_of_key", ["key_id", "state", "endpoint", "priority", "turn"]),
    ):
        op.drop_index(index, "requests")
        op.create_index(index, "requests", columns)
