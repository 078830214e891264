"""Opens the registry's database, brings its tables to this version, and takes them back if asked.

sqlite:////srv/coordinator/state/registry.db      the default, a file of mode 0600
postgresql://user@host/pneumofed                  needs the driver psycopg (pip install 'psycopg[binary]')
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from common.errors import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"
ADVISORY_LOCK = 7053
"""Number of the PostgreSQL lock that lets one process migrate at a time."""


def default_url(state_dir: Path) -> str:
    """The SQLite database of a coordinator whose state lies in `state_dir`."""
    return URL.create("sqlite", database=str(state_dir.resolve() / "registry.db")).render_as_string(hide_password=False)


def open_database(url: str) -> Engine:
    """An engine on the database at `url`, whose tables are those of this version.

    Raises:
        ConfigError: no such kind of database, no driver, no connection, or tables of a later version.
    """
    engine = create_engine(_check(url), pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    migrate(engine)
    return engine


def migrate(engine: Engine) -> None:
    """Brings the tables to this version.

    Raises:
        ConfigError: the database cannot be reached, or a later version of pneumofed has changed it.
    """
    try:
        with _alone(engine) as connection:
            command.upgrade(_config(connection), "head")
    except CommandError as error:
        raise ConfigError(
            f"registry {_shown(engine.url)}: {error}; it was written by another version of pneumofed, install that one"
        ) from error
    except SQLAlchemyError as error:
        raise ConfigError(f"registry {_shown(engine.url)} cannot be opened: {str(error).splitlines()[0]}") from error


def take_back(engine: Engine, revision: str = "base") -> None:
    """Takes the tables back to an earlier `revision`, before an earlier version of pneumofed is installed."""
    with _alone(engine) as connection:
        command.downgrade(_config(connection), revision)


def _check(url: str) -> URL:
    """`url` with its driver.

    Raises:
        ConfigError: it is no URL of a database that is supported here.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("registry: expected sqlite:////PATH or postgresql://USER@HOST/NAME, got something else") from None
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite":
        _prepare_file(parsed)
        return parsed
    if kind not in ("postgresql", "postgres"):
        raise ConfigError(f"registry: databases are sqlite and postgresql, got {kind}")
    driver = parsed.drivername.partition("+")[2] or "psycopg"
    if find_spec(driver) is None:
        raise ConfigError(f"registry: the driver {driver} of PostgreSQL is not installed; pip install 'psycopg[binary]'")
    return parsed.set(drivername=f"postgresql+{driver}")


def _prepare_file(url: URL) -> None:
    """Makes the file first, since SQLite would make it readable for all."""
    if not url.database or url.database == ":memory:":
        raise ConfigError("registry: the SQLite URL names no file; write sqlite:////PATH/registry.db")
    try:
        os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(
            f"registry {url.database} cannot be written: {error.strerror}; check the folder and its owner"
        ) from error


def _prepare_sqlite(connection: Any, _: object) -> None:
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A connection of the only process that migrates."""
    if engine.dialect.name == "sqlite":
        with FileLock(f"{engine.url.database}.lock", mode=0o600), engine.begin() as connection:
            yield connection
        return
    with engine.begin() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
        yield connection


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)
