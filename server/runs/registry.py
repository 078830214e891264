"""The registry: what the coordinator knows of its sites and runs, and the only way to change it.

registry = Registry(open_registry_database(url))
registry.add_run("pneumonia-1", experiment.model_dump_json(), folder)     submitted
registry.move("pneumonia-1", RunState.RUNNING)                             running
registry.move("pneumonia-1", RunState.FAILED, "round 3: ...")              failed, and nothing but `resume` leads out of it

Each change is one transaction that looks at the state it starts from, so that the page and a command may work at the same time.
`open_registry_database` opens the database and brings its tables to this version:

sqlite:////srv/coordinator/state/registry.db      the default, a file of mode 0600
postgresql://user@host/pneumofed                  needs the driver psycopg (pip install 'psycopg[binary]')
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import URL, CursorResult, Engine, Select, create_engine, make_url, select, update
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import sessionmaker

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.database import migrate, sqlite_engine
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.records import RunState
from pneumofed.server.runs.tables import Event, KeyState, RunRow, SiteRow

MIGRATIONS = Path(__file__).parent / "migrations"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STATES_BEFORE: dict[RunState, tuple[RunState, ...]] = {
    RunState.RUNNING: (RunState.SUBMITTED,),
    RunState.SUCCEEDED: (RunState.SUBMITTED, RunState.RUNNING),
    RunState.FAILED: (RunState.SUBMITTED, RunState.RUNNING),
    RunState.STOPPED: (RunState.SUBMITTED, RunState.RUNNING),
}
"""From which states each can be reached; a short run is never seen running."""


class Registry:
    """Sites, runs and the activity log in one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session = sessionmaker(engine, expire_on_commit=False).begin
        """A session whose block is one transaction; what it read stays readable afterwards."""

    def close(self) -> None:
        """Closes the database."""
        self._engine.dispose()

    def add_run(self, name: str, experiment: str, folder: Path) -> RunRow:
        """Adds a new run in the state `submitted`.

        Args:
            name: also the name of its folder; see `check_run_name`.
            experiment: as JSON.
            folder: the run folder.

        Raises:
            ConfigError: the name is none, or is taken.
            ConfigError: the name is not allowed, or is taken.
        """
        check_run_name(name)
        run = RunRow(name=name, experiment=experiment, folder=str(folder), submitted=now(), state=RunState.SUBMITTED, reason="")
        try:
            with self._session() as session:
                session.add(run)
                session.flush()
                session.add(_event("submitted", "the run was submitted", run=name))
        except IntegrityError:
            raise ConfigError(
                f"run {name} exists; choose another name, or go on with it with `pneumofed server resume {name}`"
            ) from None
        return run

    def accepted(self, name: str, flower_run_id: str, app_hash: str | None) -> None:
        """Keeps under which number Flower took the run, and the hash of the app that it runs.

        Args:
            name: of the run.
            flower_run_id: Flower's number, in decimal digits.
            app_hash: SHA-256 of the app bundle in hex; None where it is not known.
        """
        with self._session() as session:
            session.execute(update(RunRow).where(RunRow.name == name).values(flower_run_id=flower_run_id, app_hash=app_hash))

    def move(self, name: str, state: RunState, reason: str = "") -> bool:
        """Brings the run into `state` and says whether that changed anything: a final state stays as it is.

        Args:
            name: of the run.
            state: the new state; `STATES_BEFORE` says from where it can be reached.
            reason: why, in a sentence; also the text of the line in the activity log.
        """
        moment = now()
        times: dict[str, Any] = {"ended": moment} if state.final else {"started": moment}
        change = update(RunRow).where(RunRow.name == name, RunRow.state.in_(STATES_BEFORE[state]))
        with self._session() as session:
            changed = _rows(session.execute(change.values(state=state, reason=reason, **times)))
            if changed:
                session.add(
                    _event(state, reason or ("the run goes on" if state == RunState.RUNNING else f"the run {state}"), run=name)
                )
        return changed

    def resume(self, name: str) -> RunRow:
        """Brings the run back to `submitted`.

        Raises:
            ConfigError: there is no such run, it goes on still, or it succeeded.
        """
        change = update(RunRow).where(RunRow.name == name, RunRow.state.in_((RunState.FAILED, RunState.STOPPED)))
        again = {"state": RunState.SUBMITTED, "reason": "", "submitted": now(), "ended": None, "flower_run_id": None}
        with self._session() as session:
            changed = _rows(session.execute(change.values(**again)))
            if changed:
                session.add(_event("resumed", "the run was submitted again, to go on after its last completed round", run=name))
        run = self.run(name)
        if not changed:
            raise ConfigError(f"run {name} is {run.state}; only a failed or stopped run can be resumed")
        return run

    def find_run(self, name: str) -> RunRow | None:
        """Finds the run of this name; None where there is none."""
        with self._session() as session:
            return session.scalar(select(RunRow).where(RunRow.name == name))

    def run(self, name: str) -> RunRow:
        """Finds the run of this name.

        Raises:
            ConfigError: there is none; the text names those that there are.
        """
        found = self.find_run(name)
        if found is None:
            known = ", ".join(run.name for run in self.runs()[:10])
            raise ConfigError(f"no run {name!r}; " + (f"the latest are {known}" if known else "none was submitted yet"))
        return found

    def runs(self) -> Sequence[RunRow]:
        """Lists all runs, the newest first."""
        return self._all(select(RunRow).order_by(RunRow.id.desc()))

    def open_runs(self) -> Sequence[RunRow]:
        """Lists the runs that have not ended."""
        return self._all(select(RunRow).where(RunRow.state.in_((RunState.SUBMITTED, RunState.RUNNING))).order_by(RunRow.id))

    def sync_sites(self, fingerprints: Mapping[str, str]) -> None:
        """Takes over whose keys the coordinator knows now: a site that is not among them any more is revoked."""
        with self._session() as session:
            known = {site.name: site for site in session.scalars(select(SiteRow))}
            for name, fingerprint in fingerprints.items():
                site = known.get(name)
                if site is None:
                    session.add(SiteRow(name=name, fingerprint=fingerprint, state=KeyState.REGISTERED))
                    session.add(_event("registered", f"the key of {name} was registered", site=name))
                elif (site.fingerprint, site.state) != (fingerprint, KeyState.REGISTERED):
                    site.fingerprint, site.state = fingerprint, KeyState.REGISTERED
                    session.add(_event("registered", f"the key of {name} was registered anew", site=name))
            for name in known.keys() - fingerprints.keys():
                if known[name].state != KeyState.REVOKED:
                    known[name].state = KeyState.REVOKED
                    session.add(_event("revoked", f"the key of {name} was revoked", site=name))

    def see_site(self, name: str, moment: datetime) -> None:
        """Keeps that the site was there at `moment`; unknown names are ignored.

        Args:
            name: of the site.
            moment: in UTC; an earlier one than the last known changes nothing.
        """
        with self._session() as session:
            site = session.get(SiteRow, name)
            if site is not None and (site.last_seen is None or site.last_seen < moment):
                site.first_seen, site.last_seen = site.first_seen or moment, moment

    def sites(self) -> Sequence[SiteRow]:
        """Lists all sites by name, revoked ones too."""
        return self._all(select(SiteRow).order_by(SiteRow.name))

    def take_events(self, name: str, lines: Sequence[Event]) -> int:
        """Adds those of `lines` that were not taken before.

        Args:
            name: of the run.
            lines: all of the run's, oldest first.

        Returns:
            How many were added; 0 where another process took the same lines in between.
        """
        with self._session() as session:
            read = session.scalar(select(RunRow.events_read).where(RunRow.name == name))
            if read is None or len(lines) <= read:
                return 0
            claim = update(RunRow).where(RunRow.name == name, RunRow.events_read == read).values(events_read=len(lines))
            if not _rows(session.execute(claim)):
                return 0  # another process took the same lines in between
            session.add_all(lines[read:])
            return len(lines) - read

    def note(self, kind: str, text: str, *, run: str | None = None, site: str | None = None) -> None:
        """Adds one line to the activity log.

        Args:
            kind: a word for the kind, 32 characters at most.
            text: the sentence that is shown.
            run: the run that it concerns, if any.
            site: the site that it concerns, if any.
        """
        with self._session() as session:
            session.add(_event(kind, text, run=run, site=site))

    def events(self, run: str | None = None, after: int = 0, limit: int = 200) -> Sequence[Event]:
        """Reads the newest `limit` events with an id above `after`, oldest first.

        Args:
            run: only events of this run, with those that concern no run; None for all.
            after: id of the last event that the caller knows; 0 for none.
            limit: how many at most.
        """
        query = select(Event).where(Event.id > after).order_by(Event.id.desc()).limit(limit)
        if run is not None:
            query = query.where((Event.run == run) | Event.run.is_(None))
        return list(reversed(self._all(query)))

    def _all(self, query: Select[Any]) -> Sequence[Any]:
        with self._session() as session:
            return session.scalars(query).all()


def open_registry(folder: CoordinatorFolder) -> Registry:
    """Opens the registry of a coordinator folder.

    Raises:
        ConfigError: the folder's settings are wrong, or the database cannot be opened.
    """
    url = folder.settings().registry
    if url is None:
        folder.state.mkdir(mode=0o700, exist_ok=True)
    return Registry(open_registry_database(url or default_url(folder.state)))


def check_run_name(name: str) -> None:
    """Checks that the name is safe as a folder's.

    Raises:
        ConfigError: anything else.
    """
    if not RUN_NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"run name {name[:80]!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit, 64 at most"
        )


def now() -> datetime:
    """Returns the time in UTC."""
    return datetime.now(UTC)


def _event(kind: str, text: str, *, run: str | None = None, site: str | None = None) -> Event:
    return Event(time=now(), kind=str(kind), text=text, run=run, site=site)


def _rows(result: Any) -> bool:
    return isinstance(result, CursorResult) and result.rowcount > 0


def default_url(state_dir: Path) -> str:
    """Builds the URL of the SQLite database of a coordinator whose state lies in `state_dir`."""
    return URL.create("sqlite", database=str(state_dir.resolve() / "registry.db")).render_as_string(hide_password=False)


def open_registry_database(url: str) -> Engine:
    """Opens an engine on the database at `url`, whose tables are those of this version.

    Raises:
        ConfigError: no such kind of database, no driver, no connection, or tables of a later version.
    """
    engine = _engine(url)
    try:
        migrate(engine, MIGRATIONS, f"registry {_shown(engine.url)}")
    except SQLAlchemyError as error:
        raise ConfigError(f"registry {_shown(engine.url)} cannot be opened: {str(error).splitlines()[0]}") from error
    return engine


def _engine(url: str) -> Engine:
    """An engine on the database at `url`, with its driver.

    Raises:
        ConfigError: it is no URL of a database that is supported here.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("registry: expected sqlite:////PATH or postgresql://USER@HOST/NAME, got something else") from None
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite":
        return _sqlite(parsed)
    if kind not in ("postgresql", "postgres"):
        raise ConfigError(f"registry: databases are sqlite and postgresql, got {kind}")
    driver = parsed.drivername.partition("+")[2] or "psycopg"
    if find_spec(driver) is None:
        raise ConfigError(f"registry: the driver {driver} of PostgreSQL is not installed; pip install 'psycopg[binary]'")
    return create_engine(parsed.set(drivername=f"postgresql+{driver}"), pool_pre_ping=True)


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("registry: the SQLite URL names no file; write sqlite:////PATH/registry.db")
    try:
        return sqlite_engine(url, pool_pre_ping=True)
    except OSError as error:
        raise ConfigError(
            f"registry {url.database} cannot be written: {error.strerror}; check the folder and its owner"
        ) from error


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)
