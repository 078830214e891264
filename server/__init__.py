"""Runs at the coordinator: the ServerApp, strategies, checkpoints, central evaluation and reports."""
