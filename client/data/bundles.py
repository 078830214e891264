"""Model bundles on the site's own patients, none of whom they were trained on.

compare_at_site(config, old, new)       two models, for the coordinator's release gate
choose_at_site(config, bundle, ...)     where this hospital's own patients put the threshold of one model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.special import expit

from pneumofed.client.federation.requests import audit_log
from pneumofed.client.federation.site_data import load_site
from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig, TrainingConfig
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError, EmptySiteError, ImageError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.evaluate import check_comparable, choose_point, compare_bundles
from pneumofed.common.model_bundle.predictor import BATCH, Predictor
from pneumofed.common.models.compute import build_compute
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.common.release import SitePoint, SiteVerdict


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
    kept = [_own_data(config, bundle)[0] for bundle in (old, new)]
    both = set(kept[0].patients) & set(kept[1].patients)
    held_out = [data.subset(np.flatnonzero([patient in both for patient in data.patients])) for data in kept]
    compute = build_compute(config.device, "fp32", config.threads)
    comparison = compare_bundles(old, new, (held_out[0], held_out[1]), compute)
    return SiteVerdict(site=config.name, time=now(), old=old.digest, new=new.digest, comparison=comparison)


def choose_at_site(
    config: SiteConfig,
    bundle: Bundle,
    policy: ThresholdPolicyName | None = None,
    target: float | None = None,
    *,
    took_part: bool = True,
    progress: Progress = NO_PROGRESS,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> SitePoint:
    """Chooses the threshold of a bundle on the site's own patients, judged as `pneumofed predict` judges them.

    Images that the bundle refuses have no decision and do not count.

    Args:
        config: the site's own.
        bundle: the model; its probabilities stay what they are.
        policy: how the threshold is chosen; None: as the bundle's own was.
        target: sensitivity or specificity to hold; None: the bundle's.
        took_part: whether the site was in the bundle's run, so that only its validation patients count; otherwise all of them do.
        progress: shows the images.
        now: returns the time that the operating point states.

    Raises:
        ConfigError: the bundle does not say which patients it was trained without, or the audit log says that the site took part after all.
        EmptySiteError: fewer than `MIN_JUDGED_PATIENTS` patients with or without pneumonia were judged.
        DataError: the site's data cannot be used, or the model does not tell these patients apart, so that no threshold is of use.
    """
    if not took_part:
        _check_took_no_part(config, bundle)
    validation, training = _own_data(config, bundle)
    predictor = Predictor(bundle, threads=config.threads)
    parts = [validation] if took_part else [training, validation]
    found = judge_records(predictor, parts, progress)
    refused = sum(map(len, parts)) - len(found)
    try:
        return choose_point(found, bundle, policy, target, site=config.name, time=now(), refused=refused)
    except EmptySiteError as error:
        way_on = "; a hospital that was not in the bundle's run has more: --took-no-part" if took_part else ""
        raise EmptySiteError(f"{error}{way_on}") from None


def _own_data(config: SiteConfig, bundle: Bundle) -> tuple[Dataset, Dataset]:
    """The site's (validation, training) images for the run that the bundle comes from, at its size."""
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
    site = load_site(config, experiment)
    return site.validation, site.train


def _check_took_no_part(config: SiteConfig, bundle: Bundle) -> None:
    origin = bundle.manifest.card.provenance
    if origin and any(entry.facts.get("run") == origin.run for entry in read_entries(audit_log(config).path)):
        raise ConfigError(
            f"{config.name} took part in the run that the bundle {bundle.manifest.name} comes from, as its audit log says: only its "
            "validation patients can judge the model; leave --took-no-part out"
        )


def judge_records(predictor: Predictor, parts: Sequence[Dataset], progress: Progress = NO_PROGRESS) -> Predictions:
    """Judges the file of each image as `pneumofed predict` does: the network's own P(pneumonia), of those that the bundle can judge.

    Args:
        predictor: of the bundle.
        parts: images with the records of their files; their decoded pixels are not used.
        progress: shows the images.
    """
    done = 0
    scores: list[float] = []
    labels: list[int] = []
    patients: list[str] = []
    for data in parts:
        for start in range(0, len(data), BATCH):
            rows = [(row, image) for row in range(start, min(start + BATCH, len(data))) if (image := _read(predictor, data, row))]
            progress.show("images judged", done := done + min(BATCH, len(data) - start), sum(map(len, parts)))
            values = [] if data.clinical is None else [data.clinical[row] for row, _ in rows]
            for (row, _), judgement in zip(rows, predictor.judge([image for _, image in rows], values=values), strict=True):
                if judgement.prediction is not None:
                    scores.append(judgement.prediction.score)
                    labels.append(int(data.labels[row] > 0))
                    patients.append(data.patients[row])
    share = expit(np.array(scores, dtype=np.float64))
    return Predictions(np.column_stack([1.0 - share, share]), np.array(labels, dtype=np.int64), tuple(patients))


def _read(predictor: Predictor, data: Dataset, row: int) -> Image | None:
    try:
        return predictor.read(data.records[row].path).image
    except ImageError:  # it was in the cache of decoded images, and its file is gone or damaged since
        return None


def default_output(kind: str, bundle: Path) -> Path:
    """Returns where a file about the bundle at `bundle` goes by default, e.g. `verdict-NAME.json`."""
    return Path(f"{kind}-{bundle.stem if bundle.suffix in ('.zip', '.tar') else bundle.name}.json")
