"""What Alembic runs, for `common.database`."""

from __future__ import annotations

from client.reading_room.tables import RoomTable
from common.database import run_migrations

run_migrations(RoomTable.metadata)
