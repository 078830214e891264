"""Two models on the site's own validation patients, none of whom either was trained on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pneumofed.client.federation.site_data import load_site
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig, TrainingConfig
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.compare import check_comparable, compare_bundles
from pneumofed.common.models.compute import build_compute
from pneumofed.common.release import SiteVerdict


def compare_at_site(
    config: SiteConfig, old: Bundle, new: Bundle, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> SiteVerdict:
    """Compares two bundles on the site's data. Patients count who were kept for validation both when the old and when the new was trained.

    Args:
        config: the site's own.
        old: the bundle in use.
        new: the bundle that is to take its place, for the same task.
        now: returns the time that the verdict states.

    Raises:
        ConfigError: a bundle does not say which patients it was trained without, or the two are one or of different tasks.
        DataError, EmptySiteError: the site's data cannot be used.
        BundleError: weights do not fit.
    """
    check_comparable(old, new)
    kept = [_validation(config, bundle) for bundle in (old, new)]
    both = set(kept[0].patients) & set(kept[1].patients)
    held_out = [data.subset(np.flatnonzero([patient in both for patient in data.patients])) for data in kept]
    compute = build_compute(config.device, "fp32", config.threads)
    comparison = compare_bundles(old, new, (held_out[0], held_out[1]), compute)
    return SiteVerdict(site=config.name, time=now(), old=old.digest, new=new.digest, comparison=comparison)


def _validation(config: SiteConfig, bundle: Bundle) -> Dataset:
    """The site's validation images for the run that the bundle comes from, at its size."""
    manifest = bundle.manifest
    origin = manifest.card.provenance
    if origin is None or origin.split_seed is None or origin.validation_fraction is None:
        raise ConfigError(
            f"the bundle {manifest.name} does not say how its run drew validation patients, so nobody knows on whom it may be judged "
            "here; let the coordinator export it again"
        )
    training = TrainingConfig(split_seed=origin.split_seed, validation_fraction=origin.validation_fraction)
    model = ModelConfig(clinical=manifest.model.clinical)
    experiment = ExperimentConfig(task=manifest.task, image=manifest.preprocessing.image, training=training, model=model)
    return load_site(config, experiment).validation


def default_output(new: Path) -> Path:
    """Returns where the verdict on the bundle at `new` goes by default."""
    return Path(f"verdict-{new.stem if new.suffix in ('.zip', '.tar') else new.name}.json")
