"""Numbers of the report: intervals against published values and their own equations, and words that never claim too much."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.server.report.course import spans
from pneumofed.server.report.numbers import (
    DASH,
    ReportedEstimate,
    approximate,
    auroc_interval,
    difference,
    hundred_span,
    number,
    of_hundred,
)
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import MetricInterval

areas = st.floats(0.0, 1.0)
sizes = st.integers(1, 2000)


def test_difference_of_shares_is_newcombes_published_one() -> None:
    """Newcombe 1998, Statistics in Medicine 17:873, table II, method 10, contrast (a): 56/70 against 48/80."""
    first = approximate(Metrics(tp=56, fn=14, tn=0, fp=0))["sensitivity"]
    second = approximate(Metrics(tp=48, fn=32, tn=0, fp=0))["sensitivity"]
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(("value", "text"), [(-0.0004, "0.000"), (-0.0006, "−0.001"), (0.0, "0.000"), (None, DASH)])
def test_what_is_rounded_to_zero_has_no_sign(value: float | None, text: str) -> None:
    assert number(value) == text


@given(areas, sizes, sizes)
def test_the_interval_of_an_auroc_holds_it_and_has_a_width(area: float, positives: int, negatives: int) -> None:
    found = auroc_interval(area, positives, negatives)
    assert found.low is not None
    assert found.high is not None
    assert 0.0 <= found.low <= area + 1e-9
    assert area - 1e-9 <= found.high <= 1.0
    assert found.high - found.low > 0


@given(areas, sizes, sizes)
def test_the_interval_of_an_auroc_mirrors(area: float, positives: int, negatives: int) -> None:
    found, mirrored = auroc_interval(area, positives, negatives), auroc_interval(1 - area, positives, negatives)
    assert (found.low, found.high) == pytest.approx((1 - (mirrored.high or 0), 1 - (mirrored.low or 0)), abs=1e-6)


def test_with_many_images_the_interval_is_that_of_hanley_and_mcneil() -> None:
    """Hanley and McNeil 1982, Radiology 143:29, eq. 2."""
    area, n = 0.9, 20_000
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = math.sqrt((area * (1 - area) + (n - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)) / n**2)
    found = auroc_interval(area, n, n)
    assert (found.low, found.high) == pytest.approx((area - 1.96 * error, area + 1.96 * error), abs=5e-5)


@pytest.mark.parametrize(("positives", "negatives", "area"), [(0, 5, 0.5), (5, 0, 0.5), (5, 5, None)])
def test_without_both_classes_there_is_no_interval(positives: int, negatives: int, area: float | None) -> None:
    assert auroc_interval(area, positives, negatives).span == ""


@given(st.one_of(st.none(), st.just(math.nan), st.just(math.inf)))
def test_what_is_undefined_is_a_dash(value: float | None) -> None:
    assert number(value) == DASH
    assert ReportedEstimate.of(MetricInterval.model_validate({"value": value, "low": value, "high": value})).number == DASH


@given(areas)
def test_all_and_none_of_a_hundred_are_said_only_where_it_is_so(value: float) -> None:
    assert (of_hundred(value) == "100") == (value == 1.0)
    assert (of_hundred(value) == "0") == (value == 0.0)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_intervals_of_a_hundred_are_rounded_outward(first: int, second: int) -> None:
    low, high = sorted((first / 1000, second / 1000))
    told_low, told_high = (int(text) for text in hundred_span(ReportedEstimate(low, low, high)).split(DASH))
    assert told_low <= 100 * low + 1e-6
    assert told_high >= 100 * high - 1e-6


@given(st.sets(st.integers(1, 40), min_size=1))
def test_spans_of_rounds_name_each_round_once(numbers: set[int]) -> None:
    told: list[int] = []
    for part in spans(sorted(numbers)).split(", "):
        first, _, last = part.partition(DASH)
        told += range(int(first), int(last or first) + 1)
    assert told == sorted(numbers)
