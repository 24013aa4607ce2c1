"""What pages of other sites may do with a preview."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """A column for it; nothing there leaves all to the server in the sandbox."""
    with op.batch_alter_table("previews", schema=None) as batch_op:
        batch_op.add_column(sa.Column("policy", sa.JSON(none_as_null=True), nullable=True))
