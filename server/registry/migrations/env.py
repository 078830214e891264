"""What Alembic runs, for `common.database`."""

from __future__ import annotations

from common.database import run_migrations
from server.registry.models import RegistryTable

run_migrations(RegistryTable.metadata)
