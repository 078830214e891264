"""Runs on disk and in the registry: folder, records, events, status, checkpoints."""
