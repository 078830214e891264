"""The comparison of two models class by class: its mean, its variance and its bound, against oracles and draws."""

from __future__ import annotations

import numpy as np
import pytest

from pneumofed.common.evaluation.class_comparison import (
    AUROC_MACRO,
    ClassesComparison,
    class_lower_ends,
    compare_classes,
    macro_bound,
)
from pneumofed.common.evaluation.comparison import Margins, NonInferiority, area_bound
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.paired import paired_areas
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from tests.common.evaluation.draws import of_scores

NAMES = ("normal", "pneumonia", "tuberculosis")


def draw(each: tuple[int, ...], sharp: float, seed: int, shared: np.ndarray | None = None, images: int = 1) -> Predictions:
    """Softmax of class scores that lie `sharp` above the others' for the true class; `images` of each patient, alike."""
    labels = np.repeat(np.arange(len(each)), np.array(each) * images)
    noise = np.random.default_rng(seed).normal(size=(len(labels) // images, len(each))).repeat(images, axis=0)
    logits = sharp * np.eye(len(each))[labels] + noise + (0.0 if shared is None else shared)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = tuple(map(str, np.arange(len(labels)) // images))
    return Predictions(probabilities, labels, names, tuple(map(str, range(len(labels)))))


def compared(old: Predictions, new: Predictions, names: tuple[str, ...] = NAMES) -> ClassesComparison:
    return compare_classes(old, new, (0.5, 0.5), (old.probabilities, new.probabilities), names)


def test_the_mean_is_that_of_the_metrics_and_each_class_is_its_two_class_area() -> None:
    old, new = draw((40, 30, 20), 1.0, 0), draw((40, 30, 20), 1.5, 1)
    found = compared(old, new)
    assert found.macro.new == pytest.approx(metrics(Statistics.of(new), 0.5)["auroc_macro"], abs=1e-3)
    areas = [
        paired_areas(*(of_scores(one.probabilities[:, k].tolist(), (one.labels == k).tolist()) for one in (old, new)))
        for k in range(3)
    ]
    assert [one.area.old for one in found.classes.values()] == pytest.approx([area.old for area in areas])
    assert [one.patients for one in found.classes.values()] == [(40, 50), (30, 60), (20, 70)]
    assert found.macro.old == pytest.approx(np.mean([area.old for area in areas]))
    assert found.rarest == ("tuberculosis", 20)


def test_of_two_classes_the_mean_is_the_area_and_so_is_its_variance() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    old, new = (of_scores((1 / (1 + np.exp(-(labels + rng.normal(size=200))))).tolist(), labels.tolist()) for _ in range(2))
    found, area = compared(old, new, ("normal", "pneumonia")), paired_areas(old, new)
    assert (found.macro.old, found.macro.new) == pytest.approx((area.old, area.new))
    assert found.macro.var_new == pytest.approx(area.var_new, rel=0.02)
    assert found.macro.covariance == pytest.approx(area.covariance, rel=0.02, abs=1e-5)
    patients = int(labels.sum()), int((1 - labels).sum())
    assert macro_bound(found, 0.05) == pytest.approx(area_bound(area, patients, 0.05), abs=2e-3)


def test_the_variance_is_that_of_repeated_draws_with_patients_as_the_unit() -> None:
    """Images of one patient that are all alike say no more than one of them."""
    differences, variances = [], []
    for seed in range(150):
        shared = np.random.default_rng(1000 + seed).normal(size=(90, 3)).repeat(2, axis=0)
        old, new = (draw((40, 30, 20), 1.2, 2 * seed + model, shared, images=2) for model in (0, 1))
        macro = compared(old, new).macro.paired()
        differences.append(macro.difference)
        variances.append(macro.variance)
    assert np.mean(variances) == pytest.approx(np.var(differences, ddof=1), rel=0.3)  # 150 draws: 12 % standard error


def test_two_models_without_any_error_on_few_images_are_not_proved_equal() -> None:
    perfect = draw((4, 4, 4), 50.0, 0)
    outcome = compared(perfect, perfect).judge(Margins())[AUROC_MACRO]
    assert outcome.difference == 0.0
    assert (outcome.verdict, outcome.lower < -0.02) == (NonInferiority.TOO_FEW, True)
    many = draw((400, 400, 400), 50.0, 0)
    assert compared(many, many).judge(Margins())[AUROC_MACRO].verdict is NonInferiority.NOT_WORSE


def test_a_class_that_nobody_has_leaves_the_mean_unknown() -> None:
    old = draw((30, 30, 0), 2.0, 0)
    found = compared(old, old)
    assert found.macro.new is None
    assert found.judge(Margins())[AUROC_MACRO].verdict is NonInferiority.TOO_FEW
    ends = class_lower_ends(found)
    assert np.isnan([ends[AUROC_MACRO][1], ends["tuberculosis"][1]]).all()
    assert ends["pneumonia"][1] < ends["pneumonia"][0]
