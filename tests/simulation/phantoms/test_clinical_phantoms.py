"""Clinical values of phantoms: what is drawn follows the stated model, and the optimum is that of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pneumofed.common.data.clinical import with_clinical
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest
from pneumofed.common.errors import ConfigError
from pneumofed.simulation.phantoms.clinical import (
    COUGH_IF_ILL,
    COUGH_IF_WELL,
    NUMBERS,
    PHANTOM_SCHEMA,
    SHOWN_IF_ILL,
    SHOWN_IF_WELL,
    bayes_auroc,
    give_values,
)


def manifest(patients: int, share: float) -> Manifest:
    shown = round(share * patients)
    labels = ["viral"] * shown + ["normal"] * (patients - shown)
    return Manifest(tuple(ImageRecord(Path(f"{number}.png"), f"p{number}", label) for number, label in enumerate(labels)))


def drawn(patients: int = 6000, share: float = 0.6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, what the image shows, values) of a set."""
    before = manifest(patients, share)
    (after,) = give_values([before], seed)
    names = after.patients
    data = Dataset(np.zeros((patients, 1, 1), np.uint8), np.zeros(patients, np.int64), names, names, DataReport(), after.records)
    values = with_clinical(data, PHANTOM_SCHEMA).clinical
    assert values is not None
    ill = np.array([label != "normal" for label in after.labels])
    return ill, np.array([label != "normal" for label in before.labels]), values.astype(np.float64)


def log_ratio(shown: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of the Bayes classifier, from what it sees."""
    found = np.log(np.where(shown, SHOWN_IF_ILL / SHOWN_IF_WELL, (1 - SHOWN_IF_ILL) / (1 - SHOWN_IF_WELL)))
    for slot, number in enumerate(NUMBERS):
        x = np.log(values[:, slot]) if number.log else values[:, slot]
        z = (x - number.well) / number.deviation
        found += np.where(np.isnan(z), 0.0, number.shift * z - number.shift**2 / 2)
    cough = values[:, len(NUMBERS)]
    ratio = np.where(cough == 1, np.log(COUGH_IF_ILL / COUGH_IF_WELL), np.log((1 - COUGH_IF_ILL) / (1 - COUGH_IF_WELL)))
    return found + np.where(np.isnan(cough), 0.0, ratio)


def test_the_optimum_is_what_the_bayes_classifier_reaches_on_drawn_patients() -> None:
    ill, shown, values = drawn()
    nothing = np.full_like(values, np.nan)
    assert roc_auc_score(ill, log_ratio(shown, values)) == pytest.approx(bayes_auroc(), abs=0.012)
    assert roc_auc_score(ill, log_ratio(shown, nothing)) == pytest.approx(bayes_auroc(values=False), abs=0.012)
    assert bayes_auroc(image=False, values=False) == 0.5
    assert bayes_auroc(values=False) < bayes_auroc(image=False) < bayes_auroc()


def test_drawn_patients_follow_the_stated_probabilities() -> None:
    ill, shown, values = drawn()
    assert shown[ill].mean() == pytest.approx(SHOWN_IF_ILL, abs=0.02) and shown[~ill].mean() == pytest.approx(
        SHOWN_IF_WELL, abs=0.02
    )
    for slot, number in enumerate(NUMBERS):
        assert np.isnan(values[:, slot]).mean() == pytest.approx(number.missing, abs=0.02)
    cough = values[:, len(NUMBERS)]
    assert np.nanmean(cough[ill]) == pytest.approx(COUGH_IF_ILL, abs=0.03)


def test_a_patients_images_have_one_label_and_one_set_of_values_wherever_they_lie() -> None:
    records = manifest(40, 0.6).records
    twice = Manifest(tuple(record for one in records for record in (one, one)))
    (whole,) = give_values([twice], seed=3)
    assert whole.records[::2] == whole.records[1::2]
    first, second = give_values([Manifest(records[:20]), Manifest(records[20:])], seed=3, lacking=[(), ("crp",)])
    assert first.records == whole.records[:40:2]
    assert any(name.startswith("crp") for name, _ in first.records[0].others + first.records[1].others)
    assert not any(name.startswith("crp") for record in second.records for name, _ in record.others)


def test_a_share_that_no_prior_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match="90% of the phantom patients show an opacity"):
        give_values([manifest(20, 0.9)], seed=0)
