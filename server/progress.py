"""What a run's history says about its course. Nothing here is stored: a resumed run reads the same from the same lines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.config import EarlyStoppingConfig
from server.records import Metrics, RoundRecord
from server.summary_records import RunBytes, RunSummary


def validation_auroc(line: RoundRecord) -> float:
    """The round's pooled validation AUROC; -inf where it is undefined, so that any defined one is better."""
    value = line.validation.auroc if line.validation else None
    return -math.inf if value is None else value


def best_round(history: Sequence[RoundRecord]) -> int:
    """The latest round whose validation AUROC is within one standard error of the highest; 0 without history.

    The one-standard-error rule (Breiman et al. 1984, section 3.4.3): among rounds that validation cannot tell apart, the one that was
    trained longest, at the lowest learning rate. A round that was chosen once is given up only for a later one, so that a run needs to
    keep one model. Test and external results play no part in it.
    """
    if not history:
        return 0
    highest = max(history, key=validation_auroc)
    limit = validation_auroc(highest) - standard_error(highest)
    return max(line.round for line in history if validation_auroc(line) >= limit)


def standard_error(line: RoundRecord) -> float:
    """Of the round's validation AUROC (Hanley and McNeil 1982, Radiology 143:29, eq. 1); 0 where it is undefined or was not counted."""
    area, validation = validation_auroc(line), line.validation or Metrics()
    positives = validation.n_positive or 0
    negatives = (validation.n or 0) - positives
    if not (math.isfinite(area) and positives and negatives):
        return 0.0
    both_above, both_below = area / (2.0 - area), 2.0 * area**2 / (1.0 + area)
    spread = (positives - 1) * (both_above - area**2) + (negatives - 1) * (both_below - area**2)
    return math.sqrt(max(0.0, area * (1.0 - area) + spread) / (positives * negatives))


def stalled(history: Sequence[RoundRecord], cfg: EarlyStoppingConfig) -> bool:
    """Whether the last `patience_rounds` rounds brought no validation AUROC above the best before them by `min_delta`."""
    if cfg.patience_rounds == 0 or len(history) <= cfg.patience_rounds:
        return False
    before, recent = history[: -cfg.patience_rounds], history[-cfg.patience_rounds :]
    return max(map(validation_auroc, recent)) < max(map(validation_auroc, before)) + cfg.min_delta


def with_course(summary: RunSummary, history: Sequence[RoundRecord]) -> RunSummary:
    """The summary with what the history shows of the run at any time: rounds completed, the best one, and bytes.

    Args:
        summary: of the same run; all else in it stays.
        history: every completed round.
    """
    down, up = (sum(sizes) for sizes in ([line.bytes.down for line in history], [line.bytes.up for line in history]))
    sums = RunBytes(down=down, up=up, total=down + up)
    return summary.updated(rounds_completed=len(history), best_round=best_round(history), bytes=sums)
