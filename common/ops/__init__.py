"""Processes, databases, pages and the command line: what running the software needs on both sides."""
