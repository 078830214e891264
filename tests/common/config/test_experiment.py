"""The schema: what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pneumofed.common.config.choices import CORRECTED, COUNTS_STEPS
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import (
    SIMULATION_SECTION,
    build_config,
    experiment_from_json,
    list_configs,
    load_experiment,
    merge,
    parse_overrides,
    parse_value,
)
from pneumofed.common.errors import ConfigError
from pneumofed.simulation.hospitals.sources import SimulationConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainng.learning_rate=1", ["trainng", "unknown key", "'training'"]),
        ("training.learning_rat=1", ["training.learning_rat", "'learning_rate'"]),
        ("training.learning_rate=fast", ["training.learning_rate", "number", "'fast'"]),
        ("rounds=2.5", ["rounds", "integer", "2.5"]),
        ("rounds=0", ["rounds", "greater than or equal to 1", "0"]),
        ("strategy.name=fedpro", ["strategy.name", "did you mean 'fedprox'?"]),
        ("training=3", ["training", "3"]),
        ("seed=-1", ["seed", "-1"]),
    ],
)
def test_a_wrong_key_or_value_is_told_with_its_path_and_the_nearest_name(override: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(None, parse_overrides([override]))
    assert all(part in str(caught.value) for part in told), str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"rounds.*seed|seed.*rounds"):
        load_experiment(None, parse_overrides(["rounds=0", "seed=-1"]))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E3", 1e3), ("3", 3), ("0.5", 0.5), ("fedprox", "fedprox"), ("true", True)]
)
def test_yaml_numbers_are_numbers(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_json_round_trip_keeps_the_experiment() -> None:
    experiment = load_experiment(None, {"training": {"learning_rate": 3e-4}, "strategy": {"name": "krum", "malicious_sites": 1}})
    assert experiment_from_json(experiment.model_dump_json()) == experiment


def test_merge_leaves_both_sides_as_they_were() -> None:
    base, change = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(base, change) == {"a": {"b": 3, "c": 2}}
    assert (base, change) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


def test_fedprox_without_mu_takes_its_own_and_an_explicit_zero_is_kept() -> None:
    assert load_experiment(None, {"strategy": {"name": "fedprox"}}).proximal_mu > 0
    assert load_experiment(None, {"strategy": {"name": "fedprox"}, "training": {"proximal_mu": 0}}).proximal_mu == 0
    assert load_experiment(None).proximal_mu == 0


@pytest.mark.parametrize(
    "values",
    [
        {"strategy": {"name": "krum", "malicious_sites": 2, "min_sites": 4}},
        {"strategy": {"name": "fedbn"}, "model": {"norm": "group"}},
        {"rounds": 3, "model": {"head_first_rounds": 3}},
        {"loss": {"logit_adjustment": True, "class_weights": "balanced"}},
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build_config(ExperimentConfig, values)


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="keys and values"):
        load_experiment(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(tmp_path / "broken.yaml")


EXPERIMENTS = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("federation"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_each_shipped_configuration_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    assert load_experiment(path)
    simulation = given.pop(SIMULATION_SECTION, {})
    assert build_config(SimulationConfig, simulation, path.name)
    assert [key for key, value in simulation.items() if value == SimulationConfig.model_fields[key].default] == []
    assert same_as_default(given, ExperimentConfig().model_dump()) == []


def same_as_default(values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Keys of `values` that only repeat their default."""
    repeated = [key for key, value in values.items() if not isinstance(value, dict) and value == defaults.get(key)]
    nested = [
        f"{key}.{name}"
        for key, value in values.items()
        if isinstance(value, dict)
        for name in same_as_default(value, defaults[key])
    ]
    return repeated + nested


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": {"name": "fedmedian"}}, "strategy.name: fedmedian looks at single updates"),
        ({"strategy": {"name": "fedtrimmedavg"}}, "strategy.name: fedtrimmedavg"),
        ({"strategy": {"name": "fedexp"}}, "strategy.name: fedexp"),
        ({"strategy": {"name": "krum", "malicious_sites": 1}}, "strategy.name: krum"),
        ({"strategy": {"update_precision": "int8"}}, "strategy.update_precision"),
        ({"strategy": {"max_update_norm_factor": 3.0}}, "secure_aggregation.clip_norm"),
        ({"strategy": {"enough_sites": 2}}, "a secure sum needs 3 sites"),
        ({"strategy": {"enough_sites": 6, "wait_for_sites": 10}}, "a secure sum needs 7 sites"),
    ],
)
def test_what_needs_single_updates_is_refused_under_secure_aggregation(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(None, {"secure_aggregation": {"enabled": True}, **changes})
    assert told in str(caught.value)
    load_experiment(None, changes)


SGD = {"optimizer": "sgd", "learning_rate": 0.05}


@pytest.mark.parametrize("name", [*COUNTS_STEPS, "feddyn"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"optimizer": "adamw"}}, "is derived for SGD, and training.optimizer is 'adamw'"),
        ({"training": {**SGD, "proximal_mu": 20.0}}, "must be below 1"),
        ({"training": SGD, "privacy": {"mechanism": "dp_sgd"}}, "set privacy.mechanism to 'none'"),
        ({"training": SGD, "secure_aggregation": {"enabled": True}}, "looks at single updates"),
        ({"training": SGD, "central_privacy": {"enabled": True}, "model": {"norm": "group"}}, "takes more than the noisy mean"),
    ],
)
def test_what_strategies_against_drift_do_not_hold_for_is_refused(name: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(None, {"strategy": {"name": name}, **changes})
    assert told in str(caught.value)
    load_experiment(None, {"strategy": {"name": name}, "training": SGD})


def test_corrected_gradients_are_not_clipped_and_feddyn_has_its_alpha() -> None:
    for name in CORRECTED:
        with pytest.raises(ConfigError, match="leave it at 0"):
            load_experiment(None, {"strategy": {"name": name}, "training": {**SGD, "max_grad_norm": 1.0}})
    load_experiment(None, {"strategy": {"name": "fednova"}, "training": {**SGD, "max_grad_norm": 1.0}})
    assert load_experiment(None, {"strategy": {"name": "feddyn"}, "training": SGD}).proximal_mu > 0
    with pytest.raises(ConfigError, match="its alpha, above 0"):
        load_experiment(None, {"strategy": {"name": "feddyn"}, "training": {**SGD, "proximal_mu": 0}})


def test_a_secure_experiment_crosses_the_wire() -> None:
    experiment = load_experiment(None, {"secure_aggregation": {"enabled": True}, "strategy": {"name": "fedbn"}})
    assert experiment_from_json(experiment.model_dump_json()) == experiment


def test_a_configuration_is_found_by_name_and_a_file_in_the_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_experiment("fedprox").strategy.name == load_experiment("configs/fedprox.yaml").strategy.name == "fedprox"
    for name in list_configs():
        load_experiment(name)
    Path("fedprox").write_text("name: own\n", encoding="utf-8")
    assert load_experiment("fedprox").name == "own"
    with pytest.raises(ConfigError, match=r"did you mean 'fedprox'\? these come with pneumofed: .*fedprox, .*kaggle"):
        load_experiment("fedprx")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *(({"strategy": {"name": name}}, "takes no weighted mean") for name in ("fedmedian", "fedtrimmedavg", "krum")),
        ({"secure_aggregation": {"enabled": True}}, "set secure_aggregation.max_examples to 1"),
        ({"central_privacy": {"enabled": True}, "model": {"norm": "group"}}, "the same weight already"),
    ],
)
def test_hospitals_are_not_asked_to_weigh_the_same_where_that_would_change_nothing(changes: dict[str, Any], told: str) -> None:
    load_experiment(None, changes)
    strategy = {**changes.get("strategy", {}), "weight_by": "hospitals"}
    with pytest.raises(ConfigError) as caught:
        load_experiment(None, {**changes, "strategy": strategy})
    assert told in str(caught.value)
