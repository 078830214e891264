"""The one decision: pure, stricter policies permit no more, every rule refuses something and names a key of policy.yaml."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.federation.policy import UNRESTRICTED, only
from pneumofed.client.federation.policy_decision import (
    ArrivalFacts,
    Decision,
    Facts,
    RoundsBegun,
    RunRequest,
    Spending,
    TrainingData,
    ValidationAsked,
    decide,
)
from pneumofed.common.config.choices import StrategyName
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import ConfigError, PolicyError
from pneumofed.common.ops.render import default_policy
from tests.tiny import tiny_experiment

NOON = ArrivalFacts(datetime(2026, 3, 2, 12, 0))
PLAIN = RunRequest.of(tiny_experiment(), "train", "run-7", 3)
PRIVATE = replace(PLAIN, private=True, unit="image", target_epsilon=4.0, delta=1e-3)
ALONE = replace(PLAIN, work="evaluate", alone=True)
SURVEY = replace(PLAIN, work="query", survey=("label", "age"))
SUMMED = RunRequest.of(tiny_experiment(secure_aggregation={"enabled": True}), "train", "run-7", 3)
SPENDING = Spending(lineage=3.0, study=2.0, level="image", delta=1e-3, patients=100)

OWN = f"study:{'ab' * 32}:build_net"

REFUSED: list[tuple[dict[str, Any], RunRequest, Facts, str]] = [
    ({"max_epsilon": 8.0}, PLAIN, NOON, "the run is not differentially private; the limit is epsilon 8"),
    ({"max_epsilon": 3.0}, PRIVATE, NOON, "the run plans epsilon 4; the limit is 3"),
    ({"max_epsilon_per_study": 3.0}, PRIVATE, NOON, "the run plans epsilon 4; the limit is 3"),
    ({"min_unit": "patient"}, PRIVATE, NOON, "the run protects single images; the policy asks for patients"),
    ({"max_delta": 1e-4}, PRIVATE, NOON, "the run plans with delta 0.001; at most 0.0001 is allowed"),
    ({"strategies": ["krum"]}, PLAIN, NOON, "the run uses fedavg; allowed are krum"),
    (
        {"count_noise": 5.0},
        replace(PLAIN, strategy="scaffold"),
        NOON,
        "scaffold needs the exact number of images, which has noise here",
    ),
    ({"models": []}, PLAIN, NOON, "the run trains small_cnn; allowed are none"),
    ({"models": ["resnet18"]}, replace(PLAIN, model=OWN), NOON, f"the run trains {OWN}; allowed are resnet18"),
    (
        {"models": ["small_cnn"]},
        replace(PLAIN, study_loss=OWN),
        NOON,
        f"the run's loss is {OWN}; allowed are small_cnn",
    ),
    (
        {"models": ["study:abababababac"]},
        replace(PLAIN, model=OWN),
        NOON,
        f"the run trains {OWN}; allowed are study:abababababac",
    ),
    ({"require_secure_aggregation": True}, PLAIN, NOON, "the run does not use secure aggregation"),
    (
        {"min_sum_threshold": 0.7},
        SUMMED,
        NOON,
        "secure_aggregation.threshold is 0.67; at least 0.7 is asked for",
    ),
    (
        {"max_weight_in_sum": 0.3},
        SUMMED,
        NOON,
        "one site could be 0.5 of the sum; at most 0.3 is allowed (secure_aggregation.largest_weight, and enough sites)",
    ),
    (
        {"max_sum_step": 1e-9},
        SUMMED,
        NOON,
        "with 3 sites an update is rounded to steps of 2.79e-07; at most 1e-09 is allowed (a smaller secure_aggregation.clip_norm, or "
        "bits: 64)",
    ),
    (
        {"train_alone": False},
        ALONE,
        NOON,
        "the run asks this site to train once by itself, which its policy does not allow",
    ),
    ({"survey": ["sex"]}, SURVEY, NOON, "the survey asks for label, age; allowed is sex"),
    ({"max_epsilon": 8.0}, SURVEY, NOON, "a survey's counts would leave without noise (count_noise, open_statistics)"),
    (
        {"require_secure_aggregation": True},
        SURVEY,
        NOON,
        "a survey shows this site's own counts, and its policy asks for sums over sites",
    ),
    ({"quiet_hours": ["11:30-12:30"]}, PLAIN, NOON, "it is 12:00 here, within the quiet hours 11:30-12:30"),
    ({"max_rounds_per_day": 2}, PLAIN, RoundsBegun(2), "2 rounds in the last 24 hours, the limit is 2"),
    ({"min_patients": 10}, PLAIN, TrainingData(9), "9 training patients, at least 10 are needed"),
    ({"min_validation_share": 0.3}, PLAIN, NOON, "the run validates on 0.25 of the patients; at least 0.3 is asked for"),
    ({"max_validation_share": 0.2}, PLAIN, NOON, "the run validates on 0.25 of the patients; at most 0.2 is allowed"),
    ({"min_validation_patients": 9}, PLAIN, ValidationAsked(8, 0, 0), "8 validation patients, at least 9 are needed"),
    ({"max_evaluations_per_day": 3}, PLAIN, ValidationAsked(30, 3, 0), "3 evaluations in the last 24 hours, the limit is 3"),
    ({"max_evaluations_per_data": 3}, PLAIN, ValidationAsked(30, 0, 3), "3 evaluations on the same patients, the limit is 3"),
    ({"min_patients_private": 30}, PRIVATE, TrainingData(29), "29 training patients, at least 30 are needed"),
    ({"min_unit": "patient"}, PRIVATE, SPENDING, "the run protects single images; the policy asks for patients"),
    ({"max_delta": 1e-4}, PRIVATE, TrainingData(100, 120), "the run plans with delta 0.001; at most 0.0001 is allowed"),
    ({"max_delta": 1e-4}, PRIVATE, SPENDING, "the run plans with delta 0.001; at most 0.0001 is allowed"),
    (
        {"max_epsilon": 2.5},
        PRIVATE,
        SPENDING,
        "round 3 of pneumonia would bring epsilon to 3 (image, delta 0.001); the limit is 2.5",
    ),
    (
        {"max_epsilon_per_study": 1.5},
        PRIVATE,
        SPENDING,
        "round 3 of pneumonia would bring epsilon to 2 (image, delta 0.001); the limit is 1.5",
    ),
]


def policy(**values: Any) -> SitePolicy:
    return build_config(SitePolicy, {"min_patients": 1, **values})


@pytest.mark.parametrize(("values", "request_", "facts", "reason"), REFUSED)
def test_each_rule_refuses_and_names_its_key(values: dict[str, Any], request_: RunRequest, facts: Facts, reason: str) -> None:
    (key,) = values
    request_ = replace(request_, study="pneumonia")
    assert decide(policy(**values), request_, facts) == Decision(False, key, reason)
    assert key in yaml.safe_load(default_policy())
    with pytest.raises(PolicyError) as error:
        decide(policy(**values), request_, facts).enforce()
    assert (error.value.rule, error.value.public_message) == (key, f"the site's policy refuses this ({key})")
    assert decide(UNRESTRICTED, request_, facts) == Decision(permit=True)


def test_every_key_that_restricts_a_run_has_an_example() -> None:
    not_judged = {"approved_apps", "withhold", "score_bins", "open_statistics", "share_own_model"}  # the gate's, and what leaves
    not_judged |= {"images_counted"}
    not_judged |= {"min_sites_in_sum", "min_neighbours"}  # in the steps of a sum: see test_sum_terms.py
    assert {key for values, *_ in REFUSED for key in values} == set(yaml.safe_load(default_policy())) - not_judged


def test_the_first_refusal_is_that_of_privacy() -> None:
    assert decide(policy(strategies=[], max_epsilon=1.0), PLAIN, NOON).rule == "max_epsilon"
    assert decide(policy(max_epsilon=1.0, max_epsilon_per_study=1.0), PRIVATE, SPENDING).rule == "max_epsilon"


def test_what_a_request_leaves_out_no_restricting_policy_permits() -> None:
    bare = RunRequest("train", "run-7", 3, "study", private=True)
    for values in ({"strategies": ["fedavg"]}, {"models": ["resnet18"]}, {"require_secure_aggregation": True}):
        assert not decide(policy(**values), bare, NOON).permit


@pytest.mark.parametrize(
    ("models", "permitted"),
    [
        (None, True),
        ([], False),
        (["resnet18"], False),
        (["study"], True),
        (["resnet18", OWN[:18]], True),
        ([OWN.rpartition(":")[0]], True),
        (["study:" + "c" * 12], False),
    ],
)
def test_a_list_of_networks_lets_a_studys_own_in_only_by_the_word_or_its_hash(models: list[str] | None, permitted: bool) -> None:
    experiment = tiny_experiment(model={"name": OWN})
    assert decide(policy(models=models), RunRequest.of(experiment, "train", "run-7", 3), NOON).permit is permitted
    loss = tiny_experiment(loss={"name": OWN})
    with_listed_network = None if models is None else [*models, "small_cnn"]
    assert decide(policy(models=with_listed_network), RunRequest.of(loss, "train", "run-7", 3), NOON).permit is permitted


@pytest.mark.parametrize("entry", ["study:", "study:abc", "study:" + "g" * 12, OWN, "studies"])
def test_a_list_of_networks_takes_no_other_word(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.0"):
        policy(models=[entry])


def test_the_limits_of_one_key_are_judged_without_the_others() -> None:
    strict = policy(strategies=[], max_epsilon=0.0, min_patients=99)
    assert decide(only(strict, "strategies"), PLAIN, NOON).rule == "strategies"
    assert decide(only(strict, "min_patients"), PLAIN, NOON).permit


def test_a_survey_goes_by_its_own_rules_and_only_as_a_query() -> None:
    strict = policy(strategies=[], models=[], quiet_hours=["00:00-00:00"])
    assert decide(strict, SURVEY, NOON).permit
    for work in ("train", "evaluate"):
        assert decide(strict, replace(SURVEY, work=work), NOON).rule == "strategies"
    assert decide(policy(withhold=["data_report"]), SURVEY, NOON).rule == "withhold"
    for opened in ({"count_noise": 5.0}, {"open_statistics": True}):
        assert decide(policy(max_epsilon=1.0, **opened), SURVEY, NOON).permit


# --- properties -----------------------------------------------------------------------------------------------------------------

_limits = st.none() | st.floats(0.0, 10.0)
_policies = st.builds(
    policy,
    strategies=st.none() | st.lists(st.sampled_from(get_args(StrategyName)[:4]), unique=True),
    models=st.none() | st.lists(st.sampled_from(["small_cnn", "resnet18", "study", OWN[:18], "study:" + "c" * 64]), unique=True),
    min_patients=st.integers(1, 30),
    min_patients_private=st.integers(2, 30),
    min_validation_patients=st.integers(1, 30),
    max_evaluations_per_day=st.integers(0, 30),
    max_evaluations_per_data=st.integers(0, 30),
    min_validation_share=st.floats(0.0, 1.0),
    max_validation_share=st.floats(0.0, 1.0),
    max_rounds_per_day=st.integers(0, 30),
    max_epsilon=_limits,
    max_epsilon_per_study=_limits,
    max_delta=st.floats(1e-6, 1e-2),  # unset is no limit at all but the number of patients'
    min_unit=st.sampled_from(["image", "patient"]),
    require_secure_aggregation=st.booleans(),
    train_alone=st.booleans(),
    survey=st.lists(st.sampled_from(["label", "sex", "age"]), unique=True),
    quiet_hours=st.lists(st.sampled_from(["07:30-18:00", "22:00-06:00", "12:00-12:30"]), unique=True),
)
_private = st.builds(
    RunRequest,
    work=st.sampled_from(["query", "train", "evaluate"]),
    run=st.just("run-7"),
    round=st.integers(1, 9),
    study=st.just("study"),
    private=st.just(True),
    strategy=st.sampled_from(get_args(StrategyName)[:4]),
    model=st.sampled_from(["small_cnn", "resnet18", OWN]),
    study_loss=st.none() | st.just(OWN),
    secure_aggregation=st.booleans(),
    unit=st.sampled_from(["image", "patient"]),
    target_epsilon=_limits,
    delta=st.none() | st.floats(1e-6, 1e-2),
    validation_share=st.floats(0.01, 0.49),
    alone=st.booleans(),
    survey=st.sampled_from([(), ("label",), ("sex", "age")]),
)
_requests = _private | _private.map(lambda asked: replace(asked, private=False, unit=None, target_epsilon=None, delta=None))
_epsilons = st.floats(0.0, 10.0)
_facts = st.one_of(
    st.builds(ArrivalFacts, st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31))),
    st.builds(RoundsBegun, st.integers(0, 30)),
    st.builds(ValidationAsked, *[st.integers(0, 40)] * 3),
    st.builds(TrainingData, st.integers(0, 30), st.none() | st.integers(1, 5000)),
    st.builds(Spending, _epsilons, _epsilons, st.sampled_from(["image", "patient"]), st.floats(1e-6, 1e-2), st.integers(1, 5000)),
)


@given(_policies, _requests, _facts)
def test_the_same_question_has_the_same_answer_and_changes_nothing(rules: SitePolicy, request_: RunRequest, facts: Facts) -> None:
    before = rules.model_dump()
    first = decide(rules, request_, facts)
    assert decide(rules.model_copy(deep=True), replace(request_), facts) == first
    assert rules.model_dump() == before
    assert first.permit == (not first.rule) == (not first.reason)
    assert first.permit or first.rule in SitePolicy.model_fields


FLOORS = ("min_patients_private", "min_validation_patients", "min_validation_share")
CEILINGS = ("max_evaluations_per_day", "max_evaluations_per_data", "max_validation_share")


def _stricter(laxer: SitePolicy, other: SitePolicy) -> SitePolicy:
    """The stricter of two policies in each key."""

    def least(first: float | None, second: float | None) -> float | None:
        return min((value for value in (first, second) if value is not None), default=None)

    def common(first: list[Any] | None, second: list[Any] | None) -> list[Any] | None:
        return first if second is None else second if first is None else [name for name in first if name in second]

    return laxer.model_copy(
        update={
            "strategies": common(laxer.strategies, other.strategies),
            "models": common(laxer.models, other.models),
            "survey": common(laxer.survey, other.survey),
            "min_patients": max(laxer.min_patients, other.min_patients),
            **{key: max(getattr(laxer, key), getattr(other, key)) for key in FLOORS},
            **{key: min(getattr(laxer, key), getattr(other, key)) for key in CEILINGS},
            "max_rounds_per_day": min(laxer.max_rounds_per_day, other.max_rounds_per_day),
            "max_epsilon": least(laxer.max_epsilon, other.max_epsilon),
            "max_epsilon_per_study": least(laxer.max_epsilon_per_study, other.max_epsilon_per_study),
            "max_delta": least(laxer.max_delta, other.max_delta),
            "min_unit": "patient" if "patient" in (laxer.min_unit, other.min_unit) else "image",
            "require_secure_aggregation": laxer.require_secure_aggregation or other.require_secure_aggregation,
            "train_alone": laxer.train_alone and other.train_alone,
            "quiet_hours": [*laxer.quiet_hours, *other.quiet_hours],
        }
    )


@given(_policies, _policies, _requests, _facts, st.none() | st.sampled_from([key for values, *_ in REFUSED for key in values]))
def test_a_stricter_policy_never_permits_what_a_laxer_one_refuses(
    laxer: SitePolicy, other: SitePolicy, request_: RunRequest, facts: Facts, key: str | None
) -> None:
    stricter = _stricter(laxer, other)
    if key is not None:  # stricter in one key only
        stricter = laxer.model_copy(update={key: getattr(stricter, key)})
    assert decide(laxer, request_, facts).permit or not decide(stricter, request_, facts).permit
    assert decide(UNRESTRICTED, request_, facts).permit
