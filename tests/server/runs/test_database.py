"""The migrations give the models' tables, on SQLite always and on PostgreSQL where Debian's server is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.database import migrate, take_back
from pneumofed.server.runs.records import RunState
from pneumofed.server.runs.registry import MIGRATIONS, Registry, default_url, open_registry_database
from pneumofed.server.runs.tables import RegistryTable

OURS = {"site", "run", "event"}


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, RegistryTable.metadata))


def check_migrations(engine: Engine) -> None:
    assert differences(engine) == []
    assert set(inspect(engine).get_table_names()) >= OURS
    migrate(engine, MIGRATIONS, "registry")  # again changes nothing
    assert differences(engine) == []
    take_back(engine, MIGRATIONS)
    assert not OURS & set(inspect(engine).get_table_names())
    migrate(engine, MIGRATIONS, "registry")
    assert differences(engine) == []


def check_registry(registry: Registry) -> None:
    """The parts of the registry that a database could do differently."""
    registry.add_run("one", "{}", Path("/runs/one"))
    registry.accepted("one", str(2**64 - 1), "ab" * 32)
    assert registry.move("one", RunState.RUNNING)
    assert registry.move("one", RunState.FAILED, "round 1: äöü")
    assert not registry.move("one", RunState.SUCCEEDED)
    run = registry.run("one")
    assert (run.flower_run_id, run.state, run.reason) == (str(2**64 - 1), "failed", "round 1: äöü")
    assert run.submitted.tzinfo is not None
    with pytest.raises(ConfigError, match="exists"):
        registry.add_run("one", "{}", Path("/runs/one"))
    assert [event.kind for event in registry.events("one")] == ["submitted", "running", "failed"]


def test_migrations_give_the_models_and_go_back(tmp_path: Path) -> None:
    engine = open_registry_database(default_url(tmp_path))
    check_migrations(engine)
    engine.dispose()


def test_a_difference_between_models_and_migrations_would_show(tmp_path: Path) -> None:
    engine = open_registry_database(default_url(tmp_path))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE site DROP COLUMN last_seen"))
    assert differences(engine)
    engine.dispose()


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    engine = open_registry_database(default_url(tmp_path))
    assert (tmp_path / "registry.db").stat().st_mode & 0o777 == 0o600
    engine.dispose()


def test_a_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    engine = open_registry_database(default_url(tmp_path))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ConfigError, match="another version of pneumofed"):
        open_registry_database(default_url(tmp_path))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("registry.db", "expected sqlite"),
        ("sqlite://", "names no file"),
        ("sqlite:////no/such/folder/registry.db", "cannot be written"),
        ("mysql://user@host/name", "got mysql"),
        ("postgresql+nosuchdriver://user@host/name", "not installed"),
    ],
)
def test_urls_that_cannot_be_used_say_why(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_registry_database(url)


def test_a_password_is_not_told(tmp_path: Path) -> None:
    url = "postgresql+nosuchdriver://user:geheim@127.0.0.1:1/name"
    with pytest.raises(ConfigError) as caught:
        open_registry_database(url)
    assert "geheim" not in str(caught.value)


@pytest.fixture(scope="module")
def postgresql_url() -> Iterator[str]:
    """A server's URL from PNEUMOFED_TEST_POSTGRESQL, or a server of Debian's package in a temporary folder."""
    if find_spec("psycopg") is None:
        pytest.skip("needs the driver psycopg")
    if given := os.environ.get("PNEUMOFED_TEST_POSTGRESQL"):
        yield given
        return
    tools = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not tools or (os.geteuid() == 0 and not shutil.which("runuser")):
        pytest.skip("needs PostgreSQL's server, or its URL in PNEUMOFED_TEST_POSTGRESQL")
    yield from _temporary_server(tools[-1].parent)


def _temporary_server(tools: Path) -> Iterator[str]:
    """PostgreSQL refuses to run as root, so that its account does; it listens on a socket in its own folder alone."""
    with tempfile.TemporaryDirectory(prefix="pneumofed-pg-") as name:
        folder = Path(name)
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if user:
            shutil.chown(folder, "postgres")
        subprocess.run(
            [*user, str(tools / "initdb"), "-D", str(folder / "data"), "-U", "test", "-A", "trust"],
            check=True,
            capture_output=True,
        )
        control = [*user, str(tools / "pg_ctl"), "-D", str(folder / "data"), "-w", "-l", str(folder / "log")]
        subprocess.run([*control, "-o", f"-c listen_addresses='' -k {folder}", "start"], check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"postgresql://test@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True)


@pytest.mark.slow
def test_postgresql_does_the_same(postgresql_url: str) -> None:
    engine = open_registry_database(postgresql_url)
    try:
        check_migrations(engine)
        check_registry(Registry(engine))
    finally:
        take_back(engine, MIGRATIONS)
        engine.dispose()


def test_sqlite_does_the_same(registry: Registry) -> None:
    check_registry(registry)
