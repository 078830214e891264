"""Opens the registry's database and brings its tables to this version.

sqlite:////srv/coordinator/state/registry.db      the default, a file of mode 0600
postgresql://user@host/pneumofed                  needs the driver psycopg (pip install 'psycopg[binary]')
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from common.database import migrate, sqlite_engine
from common.errors import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"


def default_url(state_dir: Path) -> str:
    """The SQLite database of a coordinator whose state lies in `state_dir`."""
    return URL.create("sqlite", database=str(state_dir.resolve() / "registry.db")).render_as_string(hide_password=False)


def open_registry_database(url: str) -> Engine:
    """An engine on the database at `url`, whose tables are those of this version.

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
