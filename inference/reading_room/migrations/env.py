"""What Alembic runs, for `common.ops.database`."""

from __future__ import annotations

from pneumofed.common.ops.database import run_migrations
from pneumofed.inference.reading_room.cases import RoomTable

run_migrations(RoomTable.metadata)
