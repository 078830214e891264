"""Benchmarks whose own code decides what their numbers mean."""
