"""Sites, runs and what happened, in one database: SQLite in the coordinator folder, or PostgreSQL by URL."""
