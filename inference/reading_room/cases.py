"""The room's database: its tables in one SQLite file, and the cases in it.

`open_room_database` opens the file. `Cases` adds a case once a file, lists and finds cases, and adds readers' findings, which are kept for
ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, ColumnElement, Engine, ForeignKey, String, Text, delete, func, or_, select, update
from sqlalchemy import case as either
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.database import Columns, UtcTime, migrate, sqlite_engine
from pneumofed.inference.reading_room.schema import Label, NextQuery, WorklistQuery

NO_NUMBER = -1.0
"""In columns that must not be null, of a case that cannot be judged: no probability, so that nobody takes it for one. Rows of earlier
versions have the network's own number there, so the verdict is asked first."""
MIGRATIONS = Path(__file__).parent / "migrations"

MOST_PREVIOUS = 20
_FIRST_DAY, _LAST_DAY = date(2000, 1, 1), date(2200, 1, 1)


class RoomTable(Columns, DeclarativeBase):
    """Of all tables of a room."""


class User(RoomTable):
    """Somebody who signs in."""

    __tablename__ = "user"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    password: Mapped[str] = mapped_column(String(256))
    """As `inference.reading_room.users` writes it."""
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
    """Random, so that it reveals nothing; names the case in addresses and logs."""
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
    """What is wrong with where the map lies, as `inference.reading_room.schema.MapWarning`."""
    population: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Whether the model was judged for such a patient, in groups, as `PopulationFinding.to_json`; None in cases of earlier versions."""
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


class ClinicalRow(RoomTable):
    """Clinical values of a case, and what the model said with them; see `inference.reading_room.views`."""

    __tablename__ = "clinical"

    id: Mapped[int] = mapped_column(primary_key=True)
    case: Mapped[int] = mapped_column(ForeignKey("case.number", ondelete="CASCADE"), index=True)
    by: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(UtcTime)
    known: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Name, value and source of each known value, as `inference.reading_room.clinical.ClinicalValueView`."""
    image_only: Mapped[float | None]
    verdict: Mapped[str] = mapped_column(String(16))
    probability: Mapped[float | None]
    evidence: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


def open_room_database(path: Path) -> Engine:
    """Opens the SQLite file `path`, which is made with mode 0600 if missing, and brings its tables to this version.

    Raises:
        ConfigError: it cannot be written, or a later version of pneumofed wrote it.
    """
    try:
        # An error of SQLAlchemy quotes its parameters, which name patients, unless it is set not to.
        engine = sqlite_engine(path, ("synchronous=NORMAL", "secure_delete=ON"), hide_parameters=True)
        migrate(engine, MIGRATIONS, str(path))
    except (OSError, SQLAlchemyError) as error:
        raise ConfigError(
            f"{path} cannot be opened ({type(error).__name__}); check the folder, its owner and the disk"
        ) from error
    return engine


_SHOWN: ColumnElement[float] = either((Case.verdict == "cannot judge", NO_NUMBER), else_=Case.probability)
"""What the worklist is ordered by: images that cannot be judged have no probability, and lie beyond the least."""


class Cases:
    """Cases and findings in the room's database."""

    def __init__(self, engine: Engine) -> None:
        self._session = sessionmaker(engine, expire_on_commit=False).begin

    def add(self, case: Case, values: ClinicalRow | None = None) -> bool:
        """Adds a case, with its clinical values where some are known; False if another has the same file, which came in between."""
        try:
            with self._session() as session:
                session.add(case)
                if values is not None:
                    session.flush()
                    values.case = case.number
                    session.add(values)
            return True
        except IntegrityError:
            return False

    def set_monitored(self, identifier: str, image: int) -> None:
        """Keeps under which number the monitor knows the case.

        Args:
            identifier: of the case; nothing happens where there is none.
            image: number that the monitor returned.
        """
        with self._session() as session:
            session.execute(update(Case).where(Case.id == identifier).values(monitored=image))

    def find(self, identifier: str) -> Case | None:
        with self._session() as session:
            return session.scalar(select(Case).where(Case.id == identifier))

    def with_content(self, sha256: str) -> str | None:
        """Finds the id of the case whose file has this hash."""
        with self._session() as session:
            return session.scalar(select(Case.id).where(Case.sha256 == sha256))

    def list(self, query: WorklistQuery) -> tuple[int, int, Sequence[Case]]:
        """Lists (number of cases that `query` matches, how many of them are open, the page of them that it asks for)."""
        wanted = _conditions(query)
        counts = select(func.count(), func.count().filter(Case.finding.is_(None))).select_from(Case).where(*wanted)
        page = select(Case).where(*wanted).order_by(*_order(query)).offset(query.offset).limit(query.limit)
        with self._session() as session:
            total, unread = session.execute(counts).one()
            return total, unread, session.scalars(page).all()

    def next(self, asked: NextQuery) -> tuple[str | None, int]:
        """Finds (id of the case after `asked.after`, how many come after that one); the first case if there is no such case.

        It is found by its place in the order, so a case that does not match the query any more, having just been read, has a next.
        """
        query = asked.query.model_copy(update={"descending": asked.query.descending != asked.backwards})
        wanted = _conditions(query)
        with self._session() as session:
            if asked.after is not None:
                current = session.scalar(select(Case).where(Case.id == asked.after))
                wanted += [_after(query, current)] if current else []
            found = session.scalar(select(Case).where(*wanted).order_by(*_order(query)).limit(1))
            if found is None:
                return None, 0
            rest = session.scalar(select(func.count()).select_from(Case).where(*wanted)) or 1
            return found.id, rest - 1

    def previous(self, case: Case) -> Sequence[Case]:
        """Lists other cases of the same patient, newest first; none where the patient is unknown."""
        if not case.patient:
            return []
        others = select(Case).where(Case.patient == case.patient, Case.number != case.number)
        newest = func.coalesce(Case.study_date, func.date(Case.arrived)).desc()
        with self._session() as session:
            return session.scalars(others.order_by(newest, Case.number.desc()).limit(MOST_PREVIOUS)).all()

    def findings(self, case: Case) -> Sequence[FindingRow]:
        """Lists what readers said of the case, oldest first."""
        with self._session() as session:
            return session.scalars(select(FindingRow).where(FindingRow.case == case.number).order_by(FindingRow.id)).all()

    def judge(self, identifier: str, by: str, label: Label, note: str) -> FindingRow | None:
        """Adds a reader's finding, which now counts.

        Args:
            identifier: of the case.
            by: the reader's name.
            label: what the reader says.
            note: free text, may be empty.

        Returns:
            None if there is no such case.
        """
        with self._session() as session:
            case = session.scalar(select(Case).where(Case.id == identifier))
            if case is None:
                return None
            row = FindingRow(case=case.number, by=by, at=datetime.now(UTC), label=label, note=note)
            session.add(row)
            case.finding, case.finding_by = label, by
            session.flush()
            return row

    def remove(self, identifier: str) -> bool:
        """Takes a case and its findings away. False if there was none."""
        with self._session() as session:
            return bool(session.scalars(delete(Case).where(Case.id == identifier).returning(Case.id)).all())

    def older_than(self, moment: datetime) -> Sequence[str]:
        """Lists ids of cases that arrived before `moment`."""
        with self._session() as session:
            return session.scalars(select(Case.id).where(Case.arrived < moment)).all()

    def readings(self) -> Sequence[tuple[Case, FindingRow]]:
        """Lists the latest word of each reader on each case, in the order in which they were said."""
        latest = select(func.max(FindingRow.id)).group_by(FindingRow.case, FindingRow.by)
        query = select(Case, FindingRow).join(FindingRow, FindingRow.case == Case.number)
        with self._session() as session:
            return [
                (case, said) for case, said in session.execute(query.where(FindingRow.id.in_(latest)).order_by(FindingRow.id))
            ]

    def ids(self) -> set[str]:
        with self._session() as session:
            return set(session.scalars(select(Case.id)))

    def bytes(self) -> int:
        """Sums the size of all cases on the disk."""
        with self._session() as session:
            return session.scalar(select(func.sum(Case.bytes))) or 0


def agrees(verdict: str, label: str, likeliest: str | None = None) -> bool | None:
    """Decides whether a finding agrees with the model's verdict; None where either leaves it open.

    Args:
        verdict: of the model, see `suitability.Verdict`.
        label: of the reader, see `schema.Label`; all but `normal` and `unsure` count as pneumonia.
        likeliest: with the verdict `finding`, the class that the model thinks most probable; only that one agrees.
    """
    if verdict == "finding" and label != "unsure":
        return label == likeliest
    if verdict == "cannot judge" or label == "unsure":
        return None
    return (verdict == "normal") == (label == "normal")


def _conditions(query: WorklistQuery) -> list[ColumnElement[bool]]:
    wanted: list[ColumnElement[bool]] = []
    if query.text:
        inside = (column.contains(query.text, autoescape=True) for column in (Case.patient, Case.accession))
        wanted.append(or_(*inside, Case.id.startswith(query.text.lower(), autoescape=True)))
    if query.verdict:
        wanted.append(Case.verdict.in_(query.verdict))
    if query.finding:
        wanted.append(Case.finding.in_(query.finding))
    if query.status:
        wanted.append(Case.finding.is_(None) if query.status == "open" else Case.finding.is_not(None))
    if query.arrived_from:
        wanted.append(Case.arrived >= _midnight(query.arrived_from))
    if query.arrived_to:
        wanted.append(Case.arrived < _midnight(query.arrived_to) + timedelta(days=1))
    return wanted


def _midnight(day: date) -> datetime:
    """When `day` begins at this hospital, whose time zone the machine has; days that no case can be of, as the nearest that can."""
    return datetime.combine(min(max(day, _FIRST_DAY), _LAST_DAY), time.min).astimezone(UTC)


def _order(query: WorklistQuery) -> list[ColumnElement[Any]]:
    columns: list[Any] = [_SHOWN, Case.number] if query.sort == "probability" else [Case.number]
    return [column.desc() if query.descending else column.asc() for column in columns]


def _after(query: WorklistQuery, case: Case) -> ColumnElement[bool]:
    """What comes after `case` in the order of `query`."""
    later = Case.number < case.number if query.descending else Case.number > case.number
    if query.sort == "arrival":
        return later
    shown = NO_NUMBER if case.verdict == "cannot judge" else case.probability
    column = _SHOWN
    beyond = column < shown if query.descending else column > shown
    return or_(beyond, (column == shown) & later)
