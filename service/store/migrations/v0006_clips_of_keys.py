"""An index for the last clips of a key."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds the index."""
    made = sa.text("status = 200")
    columns = ["key_id", "sequence"]
    op.create_index("clips_of_key", "requests", columns, sqlite_where=made, postgresql_where=made)
