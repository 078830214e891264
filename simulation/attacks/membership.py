"""Membership inference: whether a patient was among those that a model was trained on.

    loss   the lower a model's loss on a patient's images, the more likely they were trained on (Yeom et al. 2018, section 3.2)
    lira   the likelihood ratio attack (Carlini et al. 2022, algorithm 1, online): shadow models are trained with and without the
           patient, and the margin is compared to Gaussians fitted to both kinds

M models are trained on random halves of P patients each. Each is attacked in turn with all others as its shadows, as Carlini et al. do
to use every model twice; whether a patient is in one model says nothing about the others. All images of a patient are in or out
together, so the patient is the unit: their images' margins are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy import stats

from pneumofed.common.evaluation.bootstrap import Bootstrap, ConfidenceInterval, resample_patients
from pneumofed.common.evaluation.metrics import auroc
from pneumofed.common.seeds import numpy_generator

Reals = npt.NDArray[np.float64]
Members = npt.NDArray[np.bool_]

FALSE_POSITIVE_RATES = (0.01, 0.001)
_RESAMPLES_AT_ONCE = 64
_LEAST_VARIANCE = 1e-12


class Share(TypedDict):
    """`hits` of `n` with its Clopper-Pearson interval."""

    value: float
    low: float
    high: float
    hits: int
    n: int


@dataclass(frozen=True)
class MembershipResult:
    """How well an attack's scores separate members from others.

    Attributes:
        auroc: with its interval from resampled patients.
        true_positive_rates: at each of `FALSE_POSITIVE_RATES`.
        roc: false and true positive rates, float64 [2, K].
    """

    auroc: ConfidenceInterval
    true_positive_rates: tuple[Share, ...]
    roc: Reals


def draw_halves(models: int, patients: int, seed: int) -> Members:
    """Draws a random half of the patients (rounded down) for each model, independently of the other models.

    Args:
        models: how many rows, M.
        patients: how many columns, P.
        seed: of the draws.

    Returns:
        bool [M, P], True where the patient is in the model's training data.
    """
    members = np.zeros((models, patients), dtype=np.bool_)
    for model in range(models):
        members[model, numpy_generator(seed, model, "members").permutation(patients)[: patients // 2]] = True
    return members


def by_patient(values: Reals, patients: Sequence[str]) -> tuple[Reals, tuple[str, ...]]:
    """Averages `values` over each patient's images.

    Args:
        values: float64 [M, N], one column an image.
        patients: the N images' patients.

    Returns:
        float64 [M, P], and the P patients' names in the order of the columns, sorted.
    """
    names, owner, counts = np.unique(np.asarray(patients, dtype=str), return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(owner, row, minlength=len(names)) for row in values])
    return sums / counts, tuple(names.tolist())


def loss_scores(margins: Reals) -> Reals:
    """Computes minus the cross-entropy of each image, from its margin log(p / (1 - p)): log p = -log(1 + exp(-margin))."""
    return -np.logaddexp(0.0, -margins)


def lira_scores(margins: Reals, members: Members) -> Reals:
    """Computes log N(margin; in) - log N(margin; out) of each model and patient, each fitted to the other M - 1 models.

    Means are a patient's own, variances one for all patients, as Carlini et al. (2022, section VI-C) advise below 64 shadow models. A
    patient who is in all shadow models, or in none, gets the mean over all patients for the side that is missing.

    Args:
        margins: float64 [M, P].
        members: bool [M, P], whether the patient was trained on.

    Returns:
        float64 [M, P], high for members.

    Raises:
        ValueError: fewer than 3 models, or a side that is empty for all patients.
    """
    if len(margins) < 3 or members.all() or not members.any():
        raise ValueError("LiRA needs three models at least, with members and others among their patients")
    return np.stack([_likelihood_ratio(margins, members, target) for target in range(len(margins))])


def judge_scores(scores: Reals, members: Members, bootstrap: Bootstrap) -> MembershipResult:
    """Measures how well `scores` separate members from others; all models' scores pooled.

    The interval of the AUROC resamples patients, each with their scores from all models. Those of true positive rates count scores
    as independent, which those of one patient under several models are only roughly.

    Args:
        scores: float64 [M, P], high for members.
        members: bool [M, P], the truth.
        bootstrap: of the AUROC's interval.
    """
    flat, truth = scores.ravel(), members.ravel()
    rates = tuple(true_positive_rate(flat[truth], flat[~truth], rate) for rate in FALSE_POSITIVE_RATES)
    return MembershipResult(auroc_by_patient(scores, members, bootstrap), rates, _roc(flat, truth))


def auroc_by_patient(scores: Reals, members: Members, bootstrap: Bootstrap) -> ConfidenceInterval:
    """Computes the AUROC of members against others over all scores, ties counting half, with its percentile interval over patients.

    Args:
        scores: float64 [M, P], high for members.
        members: bool [M, P], the truth.
        bootstrap: number and seed of the resamples of the P patients, and the confidence of the interval.

    Returns:
        The interval counts only the resamples that hold both members and others; its ends are NaN where none does.
    """
    patients = scores.shape[1]
    order = np.argsort(scores.ravel(), kind="stable")
    _, starts = np.unique(scores.ravel()[order], return_index=True)
    patient, member = np.tile(np.arange(patients), len(scores))[order], members.ravel()[order]

    def areas(draws: npt.NDArray[np.int64]) -> Reals:
        weights = draws[:, patient]
        sides = [np.add.reduceat(weights * side, starts, axis=1) for side in (~member, member)]
        return auroc(*sides)

    drawn = [areas(draws) for draws in resample_patients(patients, bootstrap, _RESAMPLES_AT_ONCE)]
    resampled = np.concatenate([np.empty(0), *drawn])
    valid = resampled[~np.isnan(resampled)]
    tail = (1.0 - bootstrap.confidence) / 2.0
    low, high = np.quantile(valid, [tail, 1.0 - tail]) if len(valid) else (np.nan, np.nan)
    value = areas(np.ones((1, patients), np.int64))[0]
    return ConfidenceInterval(value=float(value), low=float(low), high=float(high), resamples=len(valid))


def true_positive_rate(members: Reals, others: Reals, false_positive_rate: float) -> Share:
    """Computes the share of `members` that score above all but `false_positive_rate` of `others`.

    The threshold is set on the very scores that are counted. With fewer than 1 / rate others it means not a single false alarm.

    Args:
        members: float64, scores of members.
        others: float64, scores of those who are none.
        false_positive_rate: in [0, 1]; the number of others that it allows is rounded down.
    """
    allowed = int(false_positive_rate * len(others))
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return clopper_pearson(int((members > threshold).sum()), len(members))


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> Share:
    """Computes the exact interval of a share (Clopper and Pearson 1934); holds its confidence for every true share.

    Args:
        hits: from 0 to `n`.
        n: number of trials; with 0 the share is NaN and the interval [0, 1].
        confidence: in (0, 1).
    """
    tail = (1.0 - confidence) / 2.0
    low = float(stats.beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1.0 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return Share(value=hits / n if n else float("nan"), low=low, high=high, hits=hits, n=n)


def _likelihood_ratio(margins: Reals, members: Members, target: int) -> Reals:
    others = np.arange(len(margins)) != target
    seen, inside = margins[others], members[others]
    return _log_density(margins[target], seen, inside) - _log_density(margins[target], seen, ~inside)


def _log_density(values: Reals, seen: Reals, chosen: Members) -> Reals:
    """Log density of `values` [P] under Gaussians fitted to the `chosen` of `seen` [K, P]; its constant cancels between sides."""
    counts = chosen.sum(axis=0)
    overall = seen[chosen].mean()
    means = np.where(counts > 0, (seen * chosen).sum(axis=0) / np.maximum(counts, 1), overall)
    freedom = max(1, int((counts - 1).clip(0).sum()))
    variance = max(float((((seen - means) ** 2) * chosen).sum()) / freedom, _LEAST_VARIANCE)
    return -((values - means) ** 2) / (2.0 * variance) - 0.5 * np.log(variance)


def _roc(scores: Reals, truth: Members) -> Reals:
    """(false, true) positive rates by falling threshold from (0, 0), one point a distinct score, float64 [2, K]."""
    order = np.argsort(-scores, kind="stable")
    last_of_score = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(truth[order])[last_of_score] / max(1, truth.sum())
    false = np.cumsum(~truth[order])[last_of_score] / max(1, (~truth).sum())
    return np.concatenate([np.zeros((2, 1)), np.stack([false, true])], axis=1)
