"""What Alembic runs, for `common.ops.database`."""

from __future__ import annotations

from pneumofed.common.ops.database import run_migrations
from pneumofed.server.runs.tables import RegistryTable

run_migrations(RegistryTable.metadata)
