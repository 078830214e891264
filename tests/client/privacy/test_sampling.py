"""Which units are drawn, and which of their images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.privacy.plan import UnitSampler, count_units, split_into_lots
from pneumofed.common.privacy.randomness import RandomStream

KEY = bytes(32)
PATIENTS = ("b", "a", "c", "a", "a", "b", "a")
patients = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30).map(tuple)


@given(patients, st.floats(0.01, 1), st.binary(min_size=32, max_size=32))
def test_a_drawn_patient_gives_one_image_of_its_own(owners: tuple[str, ...], rate: float, key: bytes) -> None:
    sampler = UnitSampler.of(owners, "patient", rate)
    drawn = [owners[row] for row in sampler.draw(RandomStream(key))]
    assert len(drawn) == len(set(drawn))
    assert len(sampler.counts) == count_units(owners, "patient") == len(set(owners))


@given(patients, st.sampled_from(["image", "patient"]))
def test_rate_one_draws_every_unit(owners: tuple[str, ...], unit: str) -> None:
    rows = UnitSampler.of(owners, unit, 1.0).draw(RandomStream(KEY))  # type: ignore[arg-type]
    assert len(rows) == count_units(owners, unit)  # type: ignore[arg-type]


def test_numbers_of_drawn_units_are_binomial_and_draws_independent() -> None:
    sampler, stream = UnitSampler.of(tuple(map(str, range(20))), "image", 0.3), RandomStream(KEY)
    draws = [sampler.draw(stream) for _ in range(5000)]
    counts = np.bincount([len(rows) for rows in draws], minlength=21)
    expected = 5000 * scipy.stats.binom.pmf(np.arange(21), 20, 0.3)
    kept = expected > 5
    assert scipy.stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue > 1e-4
    held = np.zeros((5000, 20))
    for number, rows in enumerate(draws):
        held[number, rows] = 1
    assert np.abs(held.mean(axis=0) - 0.3).max() < 0.03
    assert np.abs(np.corrcoef(held.T) - np.eye(20)).max() < 0.07
    assert np.abs(np.corrcoef(held[:-1].T, held[1:].T)[:20, 20:]).max() < 0.07


def test_patients_are_drawn_alike_however_many_images_they_have_and_their_images_alike() -> None:
    sampler, stream = UnitSampler.of(PATIENTS, "patient", 0.5), RandomStream(KEY)
    rows = Counter(int(row) for _ in range(12_000) for row in sampler.draw(stream))
    expected = {row: 6000 / PATIENTS.count(owner) for row, owner in enumerate(PATIENTS)}
    assert all(abs(rows[row] - number) < 5 * number**0.5 for row, number in expected.items())


def test_an_empty_draw_is_possible() -> None:
    sampler, stream = UnitSampler.of(("a", "b"), "patient", 0.01), RandomStream(KEY)
    assert any(len(sampler.draw(stream)) == 0 for _ in range(10))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 16))
def test_lots_keep_units_whole_and_fit_the_memory(units: int, views: int, at_once: int) -> None:
    lots = split_into_lots(np.arange(units), views, at_once)
    together = np.concatenate([np.empty(0, dtype=int), *lots])
    assert together.tolist() == [unit for unit in range(units) for _ in range(views)]
    assert all(len(lot) % views == 0 and 0 < len(lot) <= max(at_once, views) for lot in lots)
