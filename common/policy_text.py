"""The policy that a new site folder begins with: `SitePolicy` in its defaults, with a word on each rule for who edits it."""

from __future__ import annotations

DEFAULT_POLICY = """\
# What may run here. This file is the hospital's alone and wins over every run; change it as you see fit.
# A run outside it is refused before any data is read, and the refusal is written to work/audit.jsonl.

# SHA-256 of the app bundles that may run; `installed` is the code that you installed yourself.
approved_apps: [installed]

# Strategies and networks that a run may use, e.g. [fedavg, fedprox] and [resnet18]; null allows all.
strategies: null
models: null

# With fewer training patients this hospital takes no part: an update over few patients tells much about each.
min_patients: 10

# Training rounds answered within 24 hours, over all runs.
max_rounds_per_day: 1000

# Privacy limit: a run that would spend a larger epsilon here, or that is not private at all, is refused; null sets none.
max_epsilon: null

# Whether every run must use secure aggregation, in which the coordinator sees sums over hospitals and never this one's update alone.
require_secure_aggregation: false

# Local times in which nothing is trained, e.g. ["07:30-18:00"].
quiet_hours: []
"""
