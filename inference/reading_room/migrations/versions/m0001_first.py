"""Users, tokens, cases and findings. What is there already stays, as after a crash: SQLite keeps each table as soon as it is made."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "user",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("password", sa.String(256), nullable=False),
        sa.Column("added", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_login", sa.DateTime(timezone=True), nullable=True),
        if_not_exists=True,
    )
    op.create_table(
        "token",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("added", sa.DateTime(timezone=True), nullable=False),
        if_not_exists=True,
    )
    op.create_table("case", *_case_columns(), if_not_exists=True)
    op.create_table(
        "finding",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("case", sa.Integer, sa.ForeignKey("case.number", ondelete="CASCADE"), nullable=False),
        sa.Column("by", sa.String(64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("label", sa.String(16), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        if_not_exists=True,
    )
    for column in ("arrived", "patient", "verdict", "finding"):
        op.create_index(f"ix_case_{column}", "case", [column], if_not_exists=True)
    op.create_index("ix_finding_case", "finding", ["case"], if_not_exists=True)


def downgrade() -> None:
    for table in ("finding", "case", "token", "user"):
        op.drop_table(table)


def _case_columns() -> list[sa.Column]:
    return [
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(32), nullable=False, unique=True),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("arrived", sa.DateTime(timezone=True), nullable=False),
        sa.Column("patient", sa.String(64), nullable=False),
        sa.Column("accession", sa.String(64), nullable=False),
        sa.Column("study_date", sa.Date, nullable=True),
        sa.Column("modality", sa.String(16), nullable=True),
        sa.Column("view", sa.String(16), nullable=True),
        sa.Column("sex", sa.String(1), nullable=True),
        sa.Column("age_years", sa.Double, nullable=True),
        sa.Column("manufacturer", sa.String(140), nullable=True),
        sa.Column("format", sa.String(8), nullable=False),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("height", "width", "bits")),
        *(sa.Column(name, sa.Double, nullable=False) for name in ("window_center", "window_width")),
        sa.Column("verdict", sa.String(16), nullable=False),
        *(sa.Column(name, sa.Double, nullable=False) for name in ("probability", "low", "high", "threshold")),
        sa.Column("classes", sa.JSON, nullable=False),
        sa.Column("reasons", sa.JSON, nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("has_map", sa.Boolean, nullable=False),
        sa.Column("map_area", sa.JSON, nullable=False),
        sa.Column("map_warnings", sa.JSON, nullable=False),
        sa.Column("monitored", sa.Integer, nullable=True),
        sa.Column("finding", sa.String(16), nullable=True),
        sa.Column("finding_by", sa.String(64), nullable=True),
    ]
