"""The tables. A change here needs a migration beside `m0001_first.py`; a test compares the two."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import CheckConstraint, ForeignKey, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pneumofed.common.ops.database import Columns, UtcTime
from pneumofed.server.runs.records import RunState


class KeyState(StrEnum):
    """Of a site's key."""

    REGISTERED = "registered"
    REVOKED = "revoked"


class RegistryTable(Columns, DeclarativeBase):
    """Of all tables of the registry."""


class SiteRow(RegistryTable):
    """A hospital and the key that it is known by."""

    __tablename__ = "site"
    __table_args__ = (CheckConstraint("state IN ('registered', 'revoked')", name="ck_site_state"),)

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(128))
    state: Mapped[str] = mapped_column(String(16), default=KeyState.REGISTERED)
    first_seen: Mapped[datetime | None] = mapped_column(UtcTime)
    last_seen: Mapped[datetime | None] = mapped_column(UtcTime)


class RunRow(RegistryTable):
    """One run and its folder. `events_read` counts the lines of its `events.jsonl` that stand in the table `event`."""

    __tablename__ = "run"
    __table_args__ = (
        CheckConstraint("state IN ('submitted', 'running', 'succeeded', 'failed', 'stopped')", name="ck_run_state"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    flower_run_id: Mapped[str | None] = mapped_column(String(20))  # up to 2**64 - 1, which no database integer holds
    experiment: Mapped[str] = mapped_column(Text)
    app_hash: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), default=RunState.SUBMITTED)
    reason: Mapped[str] = mapped_column(Text, default="")
    submitted: Mapped[datetime] = mapped_column(UtcTime)
    started: Mapped[datetime | None] = mapped_column(UtcTime)
    ended: Mapped[datetime | None] = mapped_column(UtcTime)
    folder: Mapped[str] = mapped_column(Text)
    events_read: Mapped[int] = mapped_column(default=0)


class Event(RegistryTable):
    """One line of the activity log."""

    __tablename__ = "event"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime] = mapped_column(UtcTime)
    run: Mapped[str | None] = mapped_column(String(64), ForeignKey("run.name"), index=True)
    round: Mapped[int | None]
    site: Mapped[str | None] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(32))
    text: Mapped[str] = mapped_column(Text)
