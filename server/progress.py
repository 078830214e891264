"""What a run's history says about its course. Nothing here is stored: a resumed run reads the same from the same lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import EarlyStoppingConfig
from server.run_folder import RunFolder

Line = Mapping[str, Any]


def validation_auroc(line: Line) -> float:
    """The round's pooled validation AUROC; -inf where it is undefined, so that any defined one is better."""
    value = line.get("validation", {}).get("auroc")
    return -math.inf if value is None or math.isnan(value) else float(value)


def best_round(history: Sequence[Line]) -> int:
    """The round with the highest validation AUROC, the latest among equals; 0 without history.

    Test and external results play no part in it.
    """
    return max(history, key=lambda line: (validation_auroc(line), line["round"]))["round"] if history else 0


def stalled(history: Sequence[Line], cfg: EarlyStoppingConfig) -> bool:
    """Whether the last `patience_rounds` rounds brought no validation AUROC above the best before them by `min_delta`."""
    if cfg.patience_rounds == 0 or len(history) <= cfg.patience_rounds:
        return False
    before, recent = history[: -cfg.patience_rounds], history[-cfg.patience_rounds :]
    return max(map(validation_auroc, recent)) < max(map(validation_auroc, before)) + cfg.min_delta


def course(folder: RunFolder) -> dict[str, Any]:
    """What the history alone tells of a run, at any time."""
    history = folder.read_history()
    sums = {way: sum(line["bytes"][way] for line in history) for way in ("down", "up")}
    return {
        "rounds_completed": len(history),
        "best_round": best_round(history),
        "bytes": {**sums, "total": sum(sums.values())},
    }
