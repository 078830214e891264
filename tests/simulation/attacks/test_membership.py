"""The attacks on synthetic models whose secrets are known, and the statistics against other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from pneumofed.common.evaluation.bootstrap import Bootstrap
from pneumofed.simulation.attacks.membership import (
    auroc_by_patient,
    by_patient,
    clopper_pearson,
    draw_halves,
    judge_scores,
    lira_scores,
    loss_scores,
    true_positive_rate,
)
from pneumofed.simulation.attacks.victims import margins

BOOTSTRAP = Bootstrap(resamples=300, seed=1)


def _synthetic_margins(leak: float, models: int = 12, patients: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Margins of models that shift a member's margin by `leak` deviations; patients differ far more in how hard they are."""
    generator = np.random.default_rng(seed)
    members = draw_halves(models, patients, seed)
    hardness = 4.0 * generator.standard_normal(patients)
    return hardness + leak * members + generator.standard_normal((models, patients)), members


def test_a_model_that_memorises_gives_its_members_away() -> None:
    margins_, members = _synthetic_margins(leak=30.0)
    for scores in (loss_scores(margins_), lira_scores(margins_, members)):
        assert judge_scores(scores, members, BOOTSTRAP).auroc["value"] > 0.99


def test_a_model_that_ignores_its_data_gives_nobody_away() -> None:
    inside = 0
    for seed in range(10):
        margins_, members = _synthetic_margins(leak=0.0, seed=seed)
        found = judge_scores(lira_scores(margins_, members), members, BOOTSTRAP).auroc
        inside += found["low"] <= 0.5 <= found["high"]
    assert inside >= 8


def test_lira_sees_what_the_loss_hides_behind_hard_patients() -> None:
    margins_, members = _synthetic_margins(leak=2.0)
    lira = judge_scores(lira_scores(margins_, members), members, BOOTSTRAP).auroc
    loss = judge_scores(loss_scores(margins_), members, BOOTSTRAP).auroc
    assert lira["low"] > loss["high"]


def test_lira_comes_near_the_best_possible_attack() -> None:
    """With known Gaussians the likelihood ratio's AUROC is Phi(leak / sqrt(2)) (Green and Swets 1966)."""
    margins_, members = _synthetic_margins(leak=2.0, models=40, patients=300)
    best = stats.norm.cdf(2.0 / np.sqrt(2.0))
    assert best - 0.03 < judge_scores(lira_scores(margins_, members), members, BOOTSTRAP).auroc["value"] < best + 0.01


def test_lira_needs_no_patient_to_be_on_both_sides() -> None:
    margins_, members = _synthetic_margins(leak=2.0, models=4, patients=40)
    members[:, 0], members[:, 1] = True, False
    assert np.isfinite(lira_scores(margins_, members)).all()


def test_lira_refuses_too_few_models() -> None:
    with pytest.raises(ValueError, match="three models"):
        lira_scores(np.zeros((2, 5)), np.ones((2, 5), dtype=bool))


def test_halves_are_halves_and_independent() -> None:
    members = draw_halves(200, 40, seed=3)
    assert (members.sum(axis=1) == 20).all()
    together = np.corrcoef(members[:100].ravel(), members[100:].ravel())[0, 1]
    assert abs(together) < 0.06
    assert np.array_equal(members, draw_halves(200, 40, seed=3))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_auroc_is_that_of_scikit_learn_with_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    members = draw_halves(3, 12, seed)
    scores = generator.integers(0, 6, members.shape).astype(np.float64)
    found = auroc_by_patient(scores, members, Bootstrap(resamples=5, seed=seed))
    assert found["value"] == pytest.approx(roc_auc_score(members.ravel(), scores.ravel()))


def test_the_interval_is_wider_for_few_patients_however_many_models_they_are_in() -> None:
    def width(patients: int, models: int) -> float:
        margins_, members = _synthetic_margins(leak=1.0, models=models, patients=patients)
        found = auroc_by_patient(margins_, members, BOOTSTRAP)
        return found["high"] - found["low"]

    assert width(patients=20, models=20) > 1.5 * width(patients=200, models=20)


def test_true_positive_rate_allows_so_many_false_alarms() -> None:
    others = np.arange(1000.0)
    members = np.array([995.0, 990.5, 989.0, 2000.0])
    assert true_positive_rate(members, others, 0.01)["hits"] == 3  # above the 11th highest, which is 989
    assert true_positive_rate(members, others, 0.0)["hits"] == 1
    assert true_positive_rate(members, others[:0], 0.01)["hits"] == 4


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (3, 30), (30, 30)])
def test_clopper_pearson_is_that_of_scipy(hits: int, n: int) -> None:
    found, exact = clopper_pearson(hits, n), stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    assert (found["low"], found["high"]) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_the_roc_curve_has_the_area_of_the_verdict() -> None:
    margins_, members = _synthetic_margins(leak=1.0)
    verdict = judge_scores(margins_, members, BOOTSTRAP)
    assert np.trapezoid(verdict.roc[1], verdict.roc[0]) == pytest.approx(verdict.auroc["value"])
    assert verdict.roc[:, -1].tolist() == [1.0, 1.0]


def test_images_of_a_patient_are_averaged() -> None:
    means, names = by_patient(np.array([[1.0, 3.0, 5.0]]), ["b", "a", "b"])
    assert names == ("a", "b")
    assert means.tolist() == [[3.0, 3.0]]


def test_margins_stay_finite_and_exact_where_confidence_rounds_to_one() -> None:
    probabilities = np.array([[1.0 - 1e-30, 1e-30], [0.25, 0.75], [1.0, 0.0]])
    found = margins(probabilities, np.array([0, 1, 1]))
    assert found[0] == pytest.approx(30 * np.log(10))
    assert found[1] == pytest.approx(np.log(3))
    assert np.isfinite(found).all()


def test_loss_scores_are_minus_the_cross_entropy() -> None:
    p = np.array([0.1, 0.5, 0.99])
    assert loss_scores(np.log(p / (1 - p))) == pytest.approx(np.log(p))
