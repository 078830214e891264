"""Terms of a secure sum: the defaults of run and policy fit, each key refuses something, and a stricter policy accepts no more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.sum_terms import broken_term
from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.secure_aggregation.quantization import coarsest_step

_terms = st.builds(
    SecureAggregationConfig,
    enabled=st.just(True),
    threshold=st.floats(0.51, 1.0),
    clip_norm=st.floats(1e-3, 1e6),
    bits=st.sampled_from([32, 64]),
    max_examples=st.integers(1, 2**20),
    largest_weight=st.floats(0.01, 1.0),
    neighbours=st.none() | st.integers(2, 30).map(lambda half: 2 * half),
)
_sites = st.none() | st.integers(3, 80)
_keys = {
    "min_sum_threshold": st.floats(0.51, 1.0),
    "min_sites_in_sum": st.integers(3, 80),
    "max_weight_in_sum": st.floats(0.01, 1.0),
    "max_sum_step": st.floats(1e-9, 1.0),
    "min_neighbours": st.integers(4, 80),
}
LAXER: dict[str, Any] = {
    "min_sum_threshold": lambda value: (value + 0.501) / 2,
    "min_sites_in_sum": lambda value: max(3, value - 1),
    "max_weight_in_sum": lambda value: min(1.0, 2 * value),
    "max_sum_step": lambda value: 2 * value,
    "min_neighbours": lambda value: max(4, value - 1),
}


@pytest.mark.parametrize("sites", [None, *range(3, 57)])
def test_the_defaults_of_a_run_are_accepted_by_the_default_policy(sites: int | None) -> None:
    assert broken_term(SitePolicy(), SecureAggregationConfig(enabled=True), sites) is None


@pytest.mark.parametrize(
    ("policy", "terms", "sites", "key"),
    [
        ({}, {"threshold": 2 / 3}, None, "min_sum_threshold"),
        ({"min_sites_in_sum": 6}, {}, 5, "min_sites_in_sum"),
        ({}, {"largest_weight": 0.51}, None, "max_weight_in_sum"),
        ({"max_weight_in_sum": 0.4}, {"largest_weight": 0.1}, 3, None),
        ({"max_weight_in_sum": 0.3}, {"largest_weight": 0.1}, 3, "max_weight_in_sum"),
        ({}, {"clip_norm": 1e5}, None, "max_sum_step"),
        ({}, {"clip_norm": 1e5, "bits": 64}, 60, None),
        ({}, {"clip_norm": 1e3}, 60, "max_sum_step"),
        ({}, {"neighbours": 4}, 60, "min_neighbours"),
        ({"min_neighbours": 4}, {"neighbours": 4, "clip_norm": 10.0}, 60, None),
        ({}, {"enabled": False, "threshold": 0.51}, None, None),
    ],
)
def test_each_key_refuses_its_term(policy: dict[str, Any], terms: dict[str, Any], sites: int | None, key: str | None) -> None:
    broken = broken_term(SitePolicy(**policy), SecureAggregationConfig.model_validate({"enabled": True, **terms}), sites)
    assert (broken[0] if broken else None) == key


@given(_terms, _sites, st.fixed_dictionaries(_keys), st.sampled_from(sorted(_keys)))
def test_a_stricter_policy_accepts_no_more(
    terms: SecureAggregationConfig, sites: int | None, keys: dict[str, Any], key: str
) -> None:
    strict, laxer = SitePolicy(**keys), SitePolicy(**{**keys, key: LAXER[key](keys[key])})
    if broken_term(strict, terms, sites) is None:
        assert broken_term(laxer, terms, sites) is None


@given(_terms, st.integers(3, 80))
def test_what_is_refused_on_arrival_is_refused_for_any_number_of_sites(terms: SecureAggregationConfig, sites: int) -> None:
    assert coarsest_step(terms, 3) <= coarsest_step(terms, sites) * (1 + 1e-9)
    assert broken_term(UNRESTRICTED, terms, sites) is None
