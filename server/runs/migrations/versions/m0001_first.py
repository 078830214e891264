"""Sites, runs and events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "site",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("fingerprint", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("first_seen", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_seen", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('registered', 'revoked')", name="ck_site_state"),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("flower_run_id", sa.String(20), nullable=True),
        sa.Column("experiment", sa.Text, nullable=False),
        sa.Column("app_hash", sa.String(64), nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("submitted", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended", sa.DateTime(timezone=True), nullable=True),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("events_read", sa.Integer, nullable=False),
        sa.CheckConstraint("state IN ('submitted', 'running', 'succeeded', 'failed', 'stopped')", name="ck_run_state"),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("run", sa.String(64), sa.ForeignKey("run.name"), nullable=True),
        sa.Column("round", sa.Integer, nullable=True),
        sa.Column("site", sa.String(64), nullable=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_index("ix_event_run", "event", ["run"])


def downgrade() -> None:
    op.drop_index("ix_event_run", "event")
    for table in ("event", "run", "site"):
        op.drop_table(table)
