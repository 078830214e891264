"""Alembic's migrations of the room; `client.reading_room.tables` applies them when it opens a database."""
