"""The number of frames of each clip, for players. The input may ask for one, but is deleted when the request ends."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("requests", sa.Column("frames", sa.Integer))
