"""Alembic's migrations of the registry; `server.runs.runs.registry` applies them when it opens a database."""
