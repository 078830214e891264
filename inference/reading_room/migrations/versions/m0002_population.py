"""For each case, whether the model was judged for such a patient; NULL in cases of earlier versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("case")}
    if "population" not in there:  # after a crash: SQLite keeps the column before the version is written
        op.add_column("case", sa.Column("population", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("case", "population")
