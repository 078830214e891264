"""Alembic's migrations of the registry; `server.registry.database` applies them when it opens a database."""
