"""The model bundle that a run starts from, checked before the first round and told in the summary."""

from __future__ import annotations

from pathlib import Path

from common.config import ExperimentConfig
from common.model_bundle.start import check_start, open_start
from server.summary_records import ParentBundle, RunSummary


def describe_parent(experiment: ExperimentConfig, earlier: RunSummary | None) -> ParentBundle | None:
    """The model bundle that the run starts from; None for a run without one.

    Args:
        experiment: of the run.
        earlier: the summary of the attempt that is resumed, which has the bundle's weights already; None of a new run.

    Raises:
        ConfigError: the bundle at `model.weights` is another one than `parent`, or of another network or task.
        BundleError: it is damaged.
    """
    if experiment.parent is None:
        return None
    if earlier is not None:
        return earlier.parent or ParentBundle(digest=experiment.parent)
    bundle = open_start(Path(experiment.model.weights), trusted=[])
    check_start(experiment, bundle)
    card = bundle.manifest.card
    private = card.privacy is not None and card.privacy.mechanism != "none"
    return ParentBundle(digest=bundle.digest, name=bundle.manifest.name, signer=bundle.signer, trained_privately=private)
