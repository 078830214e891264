"""Databases of both sides: the base of their tables, how a SQLite file is opened, and migrations by Alembic.

A folder of migrations has `env.py`, which calls `run_migrations` with its tables, and `versions/`, one file a migration. A database says
in `alembic_version` which of them it has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from alembic import command, context
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import URL, Connection, DateTime, Dialect, Double, Engine, MetaData, create_engine, event, text
from sqlalchemy.types import TypeDecorator

from pneumofed.common.errors import ConfigError

logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs at each start which kind of database it found
ADVISORY_LOCK = 7053
"""Number of the PostgreSQL lock that lets one process migrate at a time."""


class UtcTime(TypeDecorator[datetime]):
    """A time with its zone. SQLite keeps no zone, so UTC goes in and comes out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Converts a time to UTC before it is written.

        Args:
            value: with its zone, or None.
            dialect: of the database; not looked at.
        """
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Gives a time that was read its zone, UTC.

        Args:
            value: without a zone from SQLite, with one from PostgreSQL, or None.
            dialect: of the database; not looked at.
        """
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Columns:
    """What the tables of every database share; each database has a declarative base of its own, so that its metadata is its own."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double(), datetime: UtcTime}
    """`float` as SQLAlchemy has it since 2.1."""


def sqlite_engine(url: URL | Path, pragmas: Sequence[str] = (), **options: Any) -> Engine:
    """Opens an engine on a SQLite file, which is made with mode 0600 if missing, with a write-ahead log and enforced foreign keys.

    Args:
        url: the file, or a URL that names one.
        pragmas: further settings of each connection, such as `secure_delete=ON`.
        options: of `sqlalchemy.create_engine`.

    Raises:
        OSError: the file cannot be made or written.
    """
    url = url if isinstance(url, URL) else URL.create("sqlite", database=str(url))
    os.close(os.open(str(url.database), os.O_RDWR | os.O_CREAT, 0o600))  # SQLite itself would make it readable for all
    engine = create_engine(url, **options)

    def prepare(connection: Any, _: object) -> None:
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=10000", *pragmas):
            connection.execute(f"PRAGMA {pragma}")

    event.listen(engine, "connect", prepare)
    return engine


def migrate(engine: Engine, migrations: Path, name: str) -> None:
    """Brings the tables to this version; of several processes one migrates and the others wait.

    Args:
        engine: on SQLite or PostgreSQL.
        migrations: the folder with `env.py` and `versions/`.
        name: what an error calls the database.

    Raises:
        ConfigError: a later version of pneumofed has changed it.
        OSError, SQLAlchemyError: it cannot be reached or written.
    """
    try:
        with _exclusive_connection(engine) as connection:
            command.upgrade(_alembic_config(connection, migrations), "head")
    except CommandError as error:
        raise ConfigError(f"{name}: {error}; it was written by another version of pneumofed, install that one") from error


def take_back(engine: Engine, migrations: Path, revision: str = "base") -> None:
    """Takes the tables back to an earlier revision, before an earlier version of pneumofed is installed.

    Args:
        engine: on SQLite or PostgreSQL.
        migrations: the folder with `env.py` and `versions/`.
        revision: Alembic's name of it; `base` removes all tables.

    Raises:
        OSError, SQLAlchemyError: it cannot be reached or written.
    """
    with _exclusive_connection(engine) as connection:
        command.downgrade(_alembic_config(connection, migrations), revision)


def run_migrations(tables: MetaData) -> None:
    """Runs an upgrade or downgrade on the connection that it was given; `env.py` calls it with its `tables`."""
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=tables, render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


@contextmanager
def _exclusive_connection(engine: Engine) -> Iterator[Connection]:
    """Opens a connection while no other process migrates."""
    if engine.dialect.name == "sqlite":
        with FileLock(f"{engine.url.database}.lock", mode=0o600), engine.begin() as connection:
            yield connection
        return
    with engine.begin() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
        yield connection


def _alembic_config(connection: Connection, migrations: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
