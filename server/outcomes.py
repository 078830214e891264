"""What training and evaluation of one round gave, whichever way the replies came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.evaluation.statistics import Statistics
from common.messages import Evaluation, Failure, Update

Evaluations = dict[str, tuple[Evaluation, Statistics]]
"""By site: what it said of itself, and its statistics."""


@dataclass
class Trained:
    """What the strategy aggregates, and what the history tells of it."""

    updates: list[Update]
    """Those of the sites; one alone, the mean over all sites, where they are summed in secret."""
    lines: dict[str, dict[str, Any]]
    """By site: what is known of its own training."""
    heads: dict[str, str]
    bytes_up: int
    left_out: Mapping[str, Failure]
    failures: Mapping[str, Failure]
    told: dict[str, Any] = field(default_factory=dict)
    """More for the round's history line."""


@dataclass
class Judged:
    """The sites' validation statistics, pooled and, where they are known, each site's own."""

    pooled: Statistics
    evaluations: Evaluations
    failures: Mapping[str, Failure]
    told: dict[str, Any] = field(default_factory=dict)
