"""No key of a run opens a hospital: each meets a rule of the policy, or there is a reason why it makes nothing more leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pydantic import BaseModel

from pneumofed.client.federation.exposure import HARMLESS, RULED, describe_exposure
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config


def keys_of(section: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{before}{name}.")
        else:
            yield before + name


def test_every_key_of_an_experiment_meets_a_rule_or_has_a_reason() -> None:
    covered = Counter([*RULED, *(key for keys in HARMLESS.values() for key in keys)])
    assert set(keys_of(ExperimentConfig)) == set(covered)
    assert set(covered.values()) == {1}


def test_every_rule_is_a_key_of_the_policy() -> None:
    assert {rule for rules in RULED.values() for rule in rules} <= set(SitePolicy.model_fields)


def test_a_policy_says_what_it_lets_leave() -> None:
    usual, limited, closed = (
        " ".join(describe_exposure(build_config(SitePolicy, values)))
        for values in ({}, {"max_epsilon": 6.0}, {"withhold": ["validation_statistics"], "count_noise": 5.0})
    )
    assert "max_epsilon limits it" in usual and "of 20 patients at least" in usual
    assert "up to epsilon 6" in limited and "since max_epsilon is set" in limited and "without a report" in limited
    assert "(withhold)" in closed and "with noise" in closed
    assert "a survey is told patients by label" in usual and "surveys are refused (max_epsilon)" in limited
    assert "noise that the ledger counts (survey)" in closed
