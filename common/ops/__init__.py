"""Processes, databases, pages and the app bundle: what running the software needs on both sides."""
