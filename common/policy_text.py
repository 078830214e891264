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

# Privacy budget of your data over all runs, and over the runs of one study: a round beyond it is refused, and so is every run that is
# not differentially private; null sets none. work/ledger.sqlite keeps what was spent: `pneumofed privacy show`.
max_epsilon: null
max_epsilon_per_study: null

# The delta at which the budget is judged, e.g. 1.0e-4; a run that plans with a larger one is refused. null: the smallest so far.
max_delta: null

# What a private run must protect at least: a single image, or a patient with all images.
min_unit: image

# What never leaves, whatever a run asks for: data_report (what was found and left out, by class), training_metrics,
# validation_statistics. The run goes on without them.
withhold: []

# Numbers of images leave with Gaussian noise of this deviation, e.g. 10, which work/ledger.sqlite counts; null: as they are.
count_noise: null

# Whether every run must use secure aggregation, in which the coordinator sees sums over hospitals and never this one's update alone.
require_secure_aggregation: false

# Local times in which nothing is trained, e.g. ["07:30-18:00"].
quiet_hours: []
"""
