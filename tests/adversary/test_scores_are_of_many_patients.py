"""Promise: the exchange of suitability scores lets out no more than an evaluation does. Attack: ask it where an evaluation is refused."""

from pathlib import Path
from typing import Any

import numpy as np

from pneumofed.client.federation.evaluations import EVALUATIONS_FILE, read_evaluations
from pneumofed.client.federation.site_data import load_site
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.model_bundle.pooled_scores import unpack_counts
from pneumofed.common.model_bundle.suitability import Suitability, fit_suitability
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.features import compute_features
from pneumofed.common.wire.messages import unpack_evaluation
from tests.adversary.hospital import Hospital
from tests.tiny import tiny_experiment

SCORED: dict[str, Any] = {"training": {"validation_fraction": 0.45}, "evaluation": {"hospital_reference": True}}
ASKS = tiny_experiment(**SCORED)


def check_of(hospital: Hospital, experiment: ExperimentConfig) -> Suitability:
    data = load_site(hospital.config, experiment).validation
    network = build_model(experiment.model, experiment.task, 3)
    features = compute_features(network, data, build_compute("cpu", "fp32", 1), experiment.model.in_channels)
    squares = np.asarray(data.pixels, np.float32) / 255
    return fit_suitability(squares, np.asarray(features), np.zeros((len(squares), 1), np.float32), patients=data.patients)


def scored(hospital: Hospital, suitability: Suitability, experiment: ExperimentConfig = ASKS, **asked: Any) -> int:
    answer = unpack_evaluation(hospital.ask("evaluate", experiment, suitability=suitability, **asked).content)
    unpack_counts(answer.statistics, answer.num_examples)
    return answer.num_examples


def test_patients_are_counted_and_not_images(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    validation = load_site(hospital.config, ASKS).validation
    assert len(set(validation.patients)) < len(validation.patients)
    assert scored(hospital, check_of(hospital, ASKS)) == len(set(validation.patients))


def test_under_a_limit_of_epsilon_and_of_few_patients_nothing_leaves(tmp_path: Path) -> None:
    few = Hospital(tmp_path / "few", 20)
    suitability = check_of(few, ASKS)
    assert scored(few, suitability) == 0
    withholding = Hospital(tmp_path / "withholding", 60, withhold=["validation_statistics"])
    assert scored(withholding, suitability) == 0
    for hospital in (few, withholding):
        assert not (Path(hospital.config.work_dir) / EVALUATIONS_FILE).exists()
    private = tiny_experiment(
        **SCORED,
        privacy={"mechanism": "dp_sgd", "unit": "patient", "target_epsilon": 5.0},
        model={"name": "small_cnn", "norm": "group"},
        loss={"logit_adjustment": False, "class_weights": "none"},
    )
    limited = Hospital(tmp_path / "limited", 60, max_epsilon=6, min_unit="patient")
    assert scored(limited, suitability, private) == 0


def test_scores_are_counted_with_the_evaluations_as_one_for_each_test(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60, max_evaluations_per_day=6)
    suitability = check_of(hospital, ASKS)
    assert hospital.refusal("evaluate", ASKS) == ""
    assert scored(hospital, suitability) > 0
    assert read_evaluations(Path(hospital.config.work_dir)).versions[0].answers == 1 + 3
    assert "max_evaluations_per_day" in hospital.refusal(
        "evaluate", ASKS, suitability=suitability
    )  # two are left, which is too few
    assert read_evaluations(Path(hospital.config.work_dir)).versions[0].answers == 1 + 3
    assert hospital.refusal("evaluate", ASKS) == ""


def test_tests_that_the_experiment_does_not_name_or_of_another_network_are_refused(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    suitability = check_of(hospital, ASKS)
    assert hospital.refusal("evaluate", tiny_experiment(), suitability=suitability)
    rows = np.random.default_rng(0)
    images, features = rows.random((8, 16, 16)).astype(np.float32), rows.normal(size=(8, 3)).astype(np.float32)
    other = fit_suitability(images, features, np.zeros((8, 1), np.float32))
    assert hospital.refusal("evaluate", ASKS, suitability=other)


def test_under_secure_aggregation_no_counts_leave_in_the_clear(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    summed = tiny_experiment(**SCORED, secure_aggregation={"enabled": True})
    assert "breaks the protocol" in hospital.refusal("evaluate", summed, suitability=check_of(hospital, ASKS))
    assert not (Path(hospital.config.work_dir) / EVALUATIONS_FILE).exists()
