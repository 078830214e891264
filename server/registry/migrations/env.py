"""What Alembic runs for each upgrade and downgrade, on the connection that `server.registry.database` hands over."""

from __future__ import annotations

from alembic import context

from server.registry.models import Base


def run() -> None:
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


run()
