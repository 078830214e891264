"""The model bundle that a run starts from, checked before the first round and told in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import ExperimentConfig
from common.model_bundle.start import check_start, open_start


def describe_parent(experiment: ExperimentConfig, summary: Mapping[str, Any], *, resumed: bool) -> dict[str, Any]:
    """`{"parent": ...}` for the summary, and nothing for a run without one. A resumed run has its weights and keeps what `summary` says.

    Raises:
        ConfigError: the bundle at `model.weights` is another one than `parent`, or of another network or task.
        BundleError: it is damaged.
    """
    if experiment.parent is None:
        return {}
    if resumed:
        return {"parent": summary.get("parent", {"digest": experiment.parent})}
    bundle = open_start(Path(experiment.model.weights), trusted=[])
    check_start(experiment, bundle)
    card = bundle.manifest.card
    private = card.privacy is not None and card.privacy.mechanism != "none"
    facts = {"digest": bundle.digest, "name": bundle.manifest.name, "signer": bundle.signer, "trained_privately": private}
    return {"parent": facts}
