"""The number of frames of each clip, for players: the input, which may ask for another one, goes at the end."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("requests", sa.Column("frames", sa.Integer))
