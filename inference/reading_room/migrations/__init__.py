"""Alembic's migrations of the room; `inference.reading_room.cases` applies them when it opens a database."""
