"""The clinical values that cases were judged with; of cases of earlier versions none is known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "clinical",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("case", sa.Integer, sa.ForeignKey("case.number", ondelete="CASCADE"), nullable=False),
        sa.Column("by", sa.String(64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("known", sa.JSON, nullable=False),
        sa.Column("image_only", sa.Double, nullable=True),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("probability", sa.Double, nullable=True),
        sa.Column("evidence", sa.JSON(none_as_null=True), nullable=True),
        if_not_exists=True,
    )
    op.create_index("ix_clinical_case", "clinical", ["case"], if_not_exists=True)


def downgrade() -> None:
    op.drop_table("clinical")
