"""The room's tables and the SQLite file that holds them."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

from sqlalchemy import JSON, Engine, ForeignKey, String, Text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from common.database import Columns, UtcTime, migrate, sqlite_engine
from common.errors import ConfigError

NO_NUMBER = -1.0
"""In columns that must not be null, of a case that cannot be judged: no probability, so that nobody takes it for one. Rows of earlier
versions have the network's own number there, so the verdict is asked first."""
MIGRATIONS = Path(__file__).parent / "migrations"


class RoomTable(Columns, DeclarativeBase):
    """Of all tables of a room."""


class User(RoomTable):
    """Somebody who signs in."""

    __tablename__ = "user"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    password: Mapped[str] = mapped_column(String(256))
    """As `client.reading_room.passwords` writes it."""
    added: Mapped[datetime] = mapped_column(UtcTime)
    last_login: Mapped[datetime | None] = mapped_column(UtcTime)


class ApiToken(RoomTable):
    """A program that asks for judgements, by the SHA-256 of its token."""

    __tablename__ = "token"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    added: Mapped[datetime] = mapped_column(UtcTime)


class Case(RoomTable):
    """One image: what its file says, what the model says, and the latest finding of a reader."""

    __tablename__ = "case"
    number: Mapped[int] = mapped_column(primary_key=True)
    """In the order of arrival."""
    id: Mapped[str] = mapped_column(String(32), unique=True)
    """Random, so that it tells nothing; names the case in addresses and logs."""
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    """Of the file as it came."""
    bytes: Mapped[int]
    """On the disk, all files of the case."""
    arrived: Mapped[datetime] = mapped_column(UtcTime, index=True)

    patient: Mapped[str] = mapped_column(String(64), index=True)
    accession: Mapped[str] = mapped_column(String(64))
    study_date: Mapped[date | None]
    modality: Mapped[str | None] = mapped_column(String(16))
    view: Mapped[str | None] = mapped_column(String(16))
    sex: Mapped[str | None] = mapped_column(String(1))
    age_years: Mapped[float | None]
    manufacturer: Mapped[str | None] = mapped_column(String(140))
    format: Mapped[str] = mapped_column(String(8))
    height: Mapped[int]
    width: Mapped[int]
    bits: Mapped[int]
    window_center: Mapped[float]
    window_width: Mapped[float]

    verdict: Mapped[str] = mapped_column(String(16), index=True)
    probability: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]
    threshold: Mapped[float]
    classes: Mapped[dict[str, float]] = mapped_column(JSON)
    reasons: Mapped[list[str]] = mapped_column(JSON)
    model: Mapped[str] = mapped_column(String(128))
    model_digest: Mapped[str] = mapped_column(String(64))
    has_map: Mapped[bool]
    map_area: Mapped[list[float]] = mapped_column(JSON)
    """left, top, width, height of what the map covers, in parts of the image."""
    map_warnings: Mapped[list[str]] = mapped_column(JSON, default=list)
    """What is wrong with where the map lies, as `client.reading_room.schema.MapWarning`."""
    monitored: Mapped[int | None]
    """The image's number in the monitor of drift."""

    finding: Mapped[str | None] = mapped_column(String(16), index=True)
    finding_by: Mapped[str | None] = mapped_column(String(64))


class FindingRow(RoomTable):
    """What a reader said of a case. Rows are added and never changed."""

    __tablename__ = "finding"

    id: Mapped[int] = mapped_column(primary_key=True)
    case: Mapped[int] = mapped_column(ForeignKey("case.number", ondelete="CASCADE"), index=True)
    by: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(UtcTime)
    label: Mapped[str] = mapped_column(String(16))
    note: Mapped[str] = mapped_column(Text)


def open_room_database(path: Path) -> Engine:
    """An engine on the SQLite file `path`, which is made with mode 0600 if missing and whose tables are those of this version.

    Raises:
        ConfigError: it cannot be written, or a later version of pneumofed wrote it.
    """
    try:
        # An error of SQLAlchemy quotes its parameters, which name patients, unless told not to.
        engine = sqlite_engine(path, ("synchronous=NORMAL", "secure_delete=ON"), hide_parameters=True)
        migrate(engine, MIGRATIONS, str(path))
    except (OSError, SQLAlchemyError) as error:
        raise ConfigError(
            f"{path} cannot be opened ({type(error).__name__}); check the folder, its owner and the disk"
        ) from error
    return engine
