"""The API key of each webhook, so that keys take turns."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the key of the request to its webhook."""
    op.add_column("webhooks", sa.Column("key_id", sa.String(64), nullable=False, server_default=""))
    key_id = "SELECT key_id FROM requests WHERE requests.id = webhooks.request_id"
    op.execute(f"UPDATE webhooks SET key_id = COALESCE(({key_id}), '')")
