"""The tables of a database brought to this version, by Alembic.

A folder of migrations has `env.py`, which calls `run_migrations` with its tables, and `versions/`, one file a migration. A database says
in `alembic_version` which of them it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command, context
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import Connection, Engine, MetaData, text

from common.errors import ConfigError

logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells at each start which kind of database it found
ADVISORY_LOCK = 7053
"""Number of the PostgreSQL lock that lets one process migrate at a time."""


def migrate(engine: Engine, migrations: Path, name: str) -> None:
    """Brings the tables to this version. `name` is what an error calls the database.

    Raises:
        ConfigError: a later version of pneumofed has changed it.
        OSError, SQLAlchemyError: it cannot be reached or written.
    """
    try:
        with _alone(engine) as connection:
            command.upgrade(_config(connection, migrations), "head")
    except CommandError as error:
        raise ConfigError(f"{name}: {error}; it was written by another version of pneumofed, install that one") from error


def take_back(engine: Engine, migrations: Path, revision: str = "base") -> None:
    """Takes the tables back to an earlier `revision`, before an earlier version of pneumofed is installed."""
    with _alone(engine) as connection:
        command.downgrade(_config(connection, migrations), revision)


def run_migrations(tables: MetaData) -> None:
    """What `env.py` runs for each upgrade and downgrade, on the connection that it was given."""
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=tables, render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


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


def _config(connection: Connection, migrations: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
