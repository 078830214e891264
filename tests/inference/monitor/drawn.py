"""Drawn references and arrivals, for the tests of drift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pneumofed.inference.monitor.reference import Observations, Reference

NAMES = ("mean", "deviation")
FEATURES = 12
FIRST_DAY = 739_000


def draw_reference(patients: int = 150, seed: int = 0) -> Reference:
    features, statistics, scores, labels = _draw(np.random.default_rng(seed), patients)
    arrays = {"features": features, "pixel_statistics": statistics, "probabilities": scores, "labels": labels}
    return Reference.of(f"bundle {seed}", NAMES, arrays)


def draw_arrivals(reference: Reference, patients: int, seed: int = 1, *, brighter: float = 0.0, a_day: int = 20) -> Observations:
    """Like the reference but for the first pixel statistic, which is `brighter` by so many standard deviations."""
    rng = np.random.default_rng(seed)
    features, statistics, scores, labels = _draw(rng, patients)
    statistics[:, 0] += brighter
    called = scores >= 0.5
    days = FIRST_DAY + np.arange(patients) // a_day
    refused = rng.random(patients) < 0.02
    return Observations(
        days=days,
        scanners=np.full(patients, "A"),
        units=np.char.add(f"{seed}-", np.arange(patients).astype(np.str_)),
        statistics=statistics,
        embedding=reference.embedding.map(features),
        probabilities=np.where(refused, np.nan, scores),
        refused=refused,
        expected_errors=np.where(refused, np.nan, np.where(called, 1.0 - scores, scores)),
        corrected=called != (labels == 1),
        read_order=np.arange(patients),
        read_days=days,
    )


def one_after_another(*parts: Observations) -> Observations:
    """The images of each of `parts` on the days after those of the one before."""
    placed, next_day, read = [], FIRST_DAY, 0
    for part in parts:
        move = next_day - int(part.days[0])
        placed.append(replace(part, days=part.days + move, read_days=part.read_days + move, read_order=part.read_order + read))
        next_day, read = int(placed[-1].days[-1]) + 1, read + len(part)
    return Observations(**{name: np.concatenate([getattr(part, name) for part in placed]) for name in vars(parts[0])})


def _draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    scores = rng.beta(0.7, 0.7, n)
    features = rng.standard_normal((n, FEATURES)) * np.linspace(3.0, 0.5, FEATURES)
    return features, rng.standard_normal((n, len(NAMES))), scores, (rng.random(n) < scores).astype(np.int64)
