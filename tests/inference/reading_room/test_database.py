"""The room's migrations give its tables, and what a room holds survives them."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.database import take_back
from pneumofed.inference.reading_room.cases import MIGRATIONS, RoomTable, open_room_database
from pneumofed.inference.reading_room.users import Users


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, RoomTable.metadata))


def execute(path: Path, statement: str) -> None:
    engine = open_room_database(path)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_migrations_give_the_tables_and_go_back(tmp_path: Path) -> None:
    engine = open_room_database(tmp_path / "room.db")
    assert differences(engine) == []
    take_back(engine, MIGRATIONS)
    assert not set(RoomTable.metadata.tables) & set(inspect(engine).get_table_names())
    engine.dispose()


def test_a_migration_that_a_crash_cut_short_is_done_again_and_loses_nothing(tmp_path: Path) -> None:
    engine = open_room_database(tmp_path / "room.db")
    Users(engine).add("li", "admin", "a long pass phrase")
    engine.dispose()
    execute(tmp_path / "room.db", 'DROP TABLE "finding"')
    execute(tmp_path / "room.db", "DELETE FROM alembic_version")
    engine = open_room_database(tmp_path / "room.db")
    assert differences(engine) == []
    assert [user.name for user in Users(engine).all()] == ["li"]
    engine.dispose()


def test_a_room_of_a_later_version_is_refused(tmp_path: Path) -> None:
    execute(tmp_path / "room.db", "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match="another version of pneumofed"):
        open_room_database(tmp_path / "room.db")


def test_the_database_and_its_lock_are_the_owners_alone(tmp_path: Path) -> None:
    open_room_database(tmp_path / "room.db").dispose()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
