"""Mergeable statistics, metrics with intervals, thresholds and plots."""
