"""Hash-chained logs: writing, verifying, reading."""
