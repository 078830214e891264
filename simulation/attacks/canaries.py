"""A lower bound on epsilon, measured: privacy auditing with one training run (Steinke, Nasr and Jagielski 2023).

m canaries, each a patient of its own, are put into the training data or left out by the toss of a coin (`make_canaries`, `toss`). The
trained model's margins on them are ranked, the highest are guessed to be in, the lowest out, and those between abstain (`guess`). Under
(epsilon, delta) differential privacy hardly more guesses are right than by randomised response with that epsilon (`p_value`); so many
right guesses as were seen rule out every epsilon below the bound (`audit`). Nothing is assumed about the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from pneumofed.common.config.classes import LabelTask, classes_of
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.seeds import numpy_generator

CanaryKind = Literal["mislabelled", "pattern"]

GUESSED_SHARES = (1.0, 0.5, 0.25, 0.1)
"""Shares of the canaries that are guessed. Few guesses are surer, many weigh more; the best is taken, and the confidence is split."""

PATTERN_SIDE = 4
"""Blocks along each side of a random pattern, each of one random grey."""

_LARGEST_EPSILON = 50.0
_HALVINGS = 40


@dataclass(frozen=True)
class Guesses:
    """What came of an audit: `canaries` in all, `made` guesses without the abstentions, and how many were `right`."""

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ValueError(f"expected right <= made <= canaries, got {self}")


@dataclass(frozen=True)
class AuditResult:
    """The measured bound: no mechanism with a smaller epsilon at `delta` gives so many right guesses in 1 - `confidence` of runs."""

    epsilon: float
    delta: float
    confidence: float
    guesses: Guesses


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Bounds the chance that so many guesses are right under (`epsilon`, `delta`) differential privacy.

    Steinke et al. 2023, corollary 5.4 and appendix D: P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i with B binomial of r trials,
    each right with e^epsilon / (1 + e^epsilon).

    Args:
        guesses: m canaries, r guesses made, v of them right.
        epsilon: at least 0.
        delta: in [0, 1].

    Returns:
        The upper bound of the chance, in [0, 1]. A small one says that the mechanism is not (`epsilon`, `delta`)-private.
    """
    right, made = guesses.right, guesses.made
    accuracy = 1.0 / (1.0 + np.exp(-epsilon))
    at_least = float(stats.binom.sf(right - 1, made, accuracy))
    just_below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), made, accuracy))
    steepest = float((just_below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, at_least + 2.0 * guesses.canaries * delta * steepest)


def epsilon_lower_bound(guesses: Guesses, delta: float, confidence: float = 0.95) -> float:
    """Finds the largest epsilon that `guesses` rule out, by bisection from below; 0 where none is ruled out.

    A mechanism that is (epsilon, delta)-private gets a bound above its epsilon in at most 1 - `confidence` of its runs.

    Args:
        guesses: what came of the audit.
        delta: at which epsilon is meant.
        confidence: in (0, 1).

    Returns:
        The bound, in [0, 50].
    """
    if p_value(guesses, 0.0, delta) >= 1.0 - confidence:
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(guesses, middle, delta) < 1.0 - confidence else (low, middle)
    return low


def guess(scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], made: int) -> Guesses:
    """Guesses the `made` // 2 highest of `scores` to be in the training data and as many lowest to be out.

    Args:
        scores: float64 [m], high where the canary seems to have been trained on; ties keep their order.
        included: bool [m], the truth that the guesses are compared to.
        made: how many guesses, at most m; an odd number makes one less.
    """
    half, order = made // 2, np.argsort(scores, kind="stable")
    low, high = order[:half], order[len(order) - half :]
    return Guesses(len(scores), 2 * half, int((~included[low]).sum() + included[high].sum()))


def audit(
    scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], delta: float, confidence: float = 0.95
) -> AuditResult:
    """Computes the best bound over `GUESSED_SHARES`.

    Each share is tested at a confidence of 1 - (1 - `confidence`) / 4 (Bonferroni), so that the best bound holds at `confidence`.

    Args:
        scores: float64 [m], high where the canary seems to have been trained on.
        included: bool [m], tossed independently with probability 1/2.
        delta: of the run.
        confidence: of the bound that comes back.
    """
    each = 1.0 - (1.0 - confidence) / len(GUESSED_SHARES)
    found = [guess(scores, included, round(share * len(scores))) for share in GUESSED_SHARES]
    bounds = [epsilon_lower_bound(guesses, delta, each) for guesses in found]
    best = int(np.argmax(bounds))
    return AuditResult(bounds[best], delta, confidence, found[best])


def toss(canaries: int, *seed: int | str) -> npt.NDArray[np.bool_]:
    """Draws which canaries are put into the training data, each with probability 1/2 independently of the others.

    Args:
        canaries: how many there are, m.
        seed: parts of the seed; the same parts give the same draw.

    Returns:
        bool [m], True where the canary is trained on.
    """
    return numpy_generator(*seed, "included canaries").random(canaries) < 0.5


def make_canaries(others: Dataset, kind: CanaryKind, task: LabelTask, count: int, seed: int) -> Dataset:
    """Makes `count` canaries, each a patient of its own with one image.

    Args:
        others: images of patients who are not in the training data; one image of each of `count` patients is taken.
        kind: `mislabelled` gives each image a wrong class; `pattern` replaces image and class by random ones.
        task: decides the classes.
        count: how many.
        seed: of what is drawn.

    Raises:
        ConfigError: `others` has fewer patients.
    """
    _, first = np.unique(np.asarray(others.patients, dtype=str), return_index=True)
    if len(first) < count:
        raise ConfigError(f"{count} canaries need as many patients outside the training data, there are {len(first)}")
    chosen = others.subset(first[:count])
    generator, classes = numpy_generator(seed, "canaries"), len(classes_of(task))
    names = tuple(f"canary-{number}" for number in range(count))
    if kind == "mislabelled":
        wrong = (chosen.labels + generator.integers(1, classes, count)) % classes
        return replace(chosen, labels=wrong.astype(np.int64), patients=names)
    patterns = _patterns(count, chosen.pixels.shape[1], generator)
    return replace(chosen, pixels=patterns, labels=generator.integers(0, classes, count), patients=names)


def _patterns(count: int, size_px: int, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """uint8 [count, S, S]: blocks of random greys, unlike any radiograph and each other."""
    blocks = generator.integers(0, 256, (count, PATTERN_SIDE, PATTERN_SIDE), dtype=np.uint8)
    position = np.arange(size_px) * PATTERN_SIDE // size_px
    return blocks[:, position][:, :, position]
