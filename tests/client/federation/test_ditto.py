"""Ditto: the steps are those of algorithm 1, the model outlives restarts and repeated rounds, and nothing of it leaves but statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import RecordDict

from pneumofed.client.app import train_round
from pneumofed.client.federation.ditto import PersonalModel, PersonalModels, find_personal_run, plain_experiment, train_personal
from pneumofed.client.federation.judging import evaluate_round
from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.site_data import SiteData, load_site, read_site_config
from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import ConfigError, DataError, MessageError
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.imaging.augment import normalize, to_model_input
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.recipe import build_loss
from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays, describe_content, unpack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import TinyFederation, there, tiny_experiment

CPU, RUN = build_compute("cpu", "fp32", threads=1), "00000000000000a7"
STILL = dict.fromkeys(("rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast", "noise_std"), 0.0)
PLAIN_SGD = {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def ditto(strength: float = 1.0, **changes: Any) -> ExperimentConfig:
    personal = {"method": "ditto", "proximal_lambda": strength, **changes.pop("personal", {})}
    return tiny_experiment(personal=personal, **changes)


def global_weights(seed: int, experiment: ExperimentConfig) -> ModelArrays:
    model = build_model(experiment.model, experiment.task, seed=seed)
    return ModelArrays(*ArraysLayout.of(model).flatten(model))


def asked(experiment: ExperimentConfig, number: int) -> Instruction:
    return Instruction(experiment, RUN, number, global_weights(number, experiment))


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    TinyFederation(tmp_path, sites=1)
    return read_site_config(tmp_path / "sites" / "0.yaml")


def after_rounds(site: SiteData, experiment: ExperimentConfig, rounds: int) -> PersonalModel:
    """v after `rounds` rounds, whose global weights are other ones each time."""
    model: PersonalModel | None = None
    for number in range(1, rounds + 1):
        instruction = asked(experiment, number)
        model = train_personal(model, instruction, there(instruction.arrays), site, CPU)
    return there(model)


def algorithm_1(site: SiteData, experiment: ExperimentConfig, rounds: int) -> np.ndarray:
    """Line by line: v = v - eta * (gradient of the loss at v + lambda * (v - w)), over batches in the house's order."""
    loss = build_loss(experiment.loss, site.class_counts(2))
    v, eta, strength = None, experiment.training.learning_rate, experiment.personal.proximal_lambda
    for number in range(1, rounds + 1):
        w = build_model(experiment.model, experiment.task, seed=number)
        if v is None:
            v = build_model(experiment.model, experiment.task, seed=number)
        v.train()
        order = numpy_generator(experiment.seed, number, site.name, "batches")
        for _ in range(experiment.personal.epochs or experiment.training.local_epochs):
            shuffled = order.permutation(len(site.train.labels))
            for start in range(0, len(shuffled), experiment.training.batch_size):
                rows = np.sort(shuffled[start : start + experiment.training.batch_size])
                inputs = normalize(to_model_input(torch.from_numpy(site.train.pixels[rows])), 1)
                gradients = torch.autograd.grad(loss(v(inputs), torch.from_numpy(site.train.labels[rows])), list(v.parameters()))
                with torch.no_grad():
                    for own, shared, gradient in zip(v.parameters(), w.parameters(), gradients, strict=True):
                        own.sub_(eta * (gradient + strength * (own - shared)))
    return ArraysLayout.of(there(v)).flatten(there(v))[0]


def test_three_rounds_are_algorithm_1_line_by_line(config: SiteConfig) -> None:
    experiment = ditto(0.7, rounds=4, training=PLAIN_SGD, augmentation=STILL, personal={"epochs": 2})
    site = load_site(config, experiment)
    assert len(site.train.labels) % 8 != 1  # a last batch of one would join the one before it
    found, oracle = after_rounds(site, experiment, 3).arrays.parameters, algorithm_1(site, experiment, 3)
    np.testing.assert_allclose(found, oracle, rtol=2e-4, atol=2e-6)
    other = after_rounds(site, ditto(0.6, rounds=4, training=PLAIN_SGD, augmentation=STILL, personal={"epochs": 2}), 3)
    assert not np.allclose(other.arrays.parameters, oracle, rtol=2e-4, atol=2e-6)


def test_without_a_pull_the_model_is_trained_alone(config: SiteConfig) -> None:
    experiment = ditto(0.0, rounds=3)
    site, alone = load_site(config, experiment), build_model(experiment.model, experiment.task, seed=1)
    for number in (1, 2):
        plan = RoundPlan(plain_experiment(experiment), number, site.name)
        train_locally(build_setup(alone, site.class_counts(2), plan, CPU), site.train, plan)
    found = after_rounds(site, experiment, 2).arrays
    np.testing.assert_array_equal(found.parameters, ArraysLayout.of(alone).flatten(alone)[0])


def test_the_stronger_the_pull_the_nearer_to_the_global_weights(config: SiteConfig) -> None:
    training = {**PLAIN_SGD, "learning_rate": 0.01, "local_epochs": 4}
    distances = []
    for strength in (0.0, 1.0, 10.0, 100.0):
        experiment = ditto(strength, rounds=3, training=training)
        own = after_rounds(load_site(config, experiment), experiment, 2).arrays.parameters
        distances.append(float(np.linalg.norm(own - global_weights(2, experiment).parameters)))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02 * distances[0]


def test_fedprox_does_not_pull_the_sites_own_model(config: SiteConfig) -> None:
    plain, prox = ditto(rounds=3), ditto(rounds=3, strategy={"name": "fedprox"}, training={"proximal_mu": 5.0})
    site = load_site(config, plain)
    np.testing.assert_array_equal(after_rounds(site, plain, 2).arrays.parameters, after_rounds(site, prox, 2).arrays.parameters)


def kept(number: int, value: float = 1.0, first: int = 1) -> PersonalModel:
    experiment = ditto()
    arrays = global_weights(1, experiment)
    return PersonalModel(experiment, RUN, number, first, replace(arrays, parameters=np.full_like(arrays.parameters, value)))


def value_before(models: PersonalModels, number: int) -> float:
    return float(there(models.before(number)).arrays.parameters[0])


def test_a_repeated_round_starts_as_it_did_and_three_rounds_are_kept(tmp_path: Path) -> None:
    models = PersonalModels.of(tmp_path, RUN)
    assert models.before(1) is None
    for number in range(1, 6):
        models.keep(kept(number, float(number)))
    assert [value_before(models, number) for number in (4, 5, 6, 9)] == [3.0, 4.0, 5.0, 5.0]
    models.keep(kept(4, 40.0))
    assert value_before(models, 9) == 40.0
    assert len(list(models.folder.glob("round-*.npz"))) == 2
    assert {folder.stat().st_mode & 0o777 for folder in (models.folder, models.folder.parent)} == {0o700}
    with pytest.raises(DataError, match="needs an earlier one"):
        models.before(3)


def test_a_first_round_that_is_repeated_begins_again(tmp_path: Path) -> None:
    models = PersonalModels.of(tmp_path, RUN)
    models.keep(kept(2, first=2))
    assert models.before(2) is None
    assert PersonalModels.of(tmp_path, "00000000000000a8").before(9) is None


def test_a_damaged_model_is_refused_and_never_begun_anew_in_silence(tmp_path: Path) -> None:
    models = PersonalModels.of(tmp_path, RUN)
    models.keep(kept(1))
    file = models.folder / "round-00001.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        models.before(2)


def test_a_run_is_found_by_token_by_name_and_by_being_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none"):
        find_personal_run(tmp_path, "")
    PersonalModels.of(tmp_path, RUN).keep(kept(3))
    assert {find_personal_run(tmp_path, name).round for name in ("", RUN, RUN[:15], "pneumonia")} == {3}
    other = "10000000000000a8"
    PersonalModels.of(tmp_path, other).keep(replace(kept(5), run=other))
    assert find_personal_run(tmp_path, other).round == 5
    for name in ("", "pneumonia", "nowhere"):
        with pytest.raises(ConfigError, match=f"{other} .pneumonia, round 5"):
            find_personal_run(tmp_path, name)


def test_a_run_keeps_its_network(config: SiteConfig) -> None:
    experiment = ditto(model={"name": "scattering", "norm": "group"})
    instruction = asked(experiment, 2)
    with pytest.raises(MessageError, match="a run keeps its network"):
        train_personal(kept(1), instruction, there(instruction.arrays), load_site(config, experiment), CPU)


def without_times(content: RecordDict) -> dict[str, Any]:
    """All that a reply holds but what a clock measured."""
    clocks = ("train_sec", "images_per_sec", "evaluate_sec")
    values: dict[str, Any] = {
        f"{kind}.{name}": value
        for records in (content.metric_records, content.config_records)
        for kind, record in records.items()
        for name, value in record.items()
        if name not in clocks
    }
    arrays = {name: array.data for record in content.array_records.values() for name, array in record.items()}
    return {**values, **arrays}


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn"])
def test_replies_hold_what_they_hold_without_an_own_model_and_its_statistics(config: SiteConfig, strategy: str) -> None:
    """Two rounds, byte for byte; the one record that is new are counts, of the same images as the global model's."""
    replies: dict[str, list[RecordDict]] = {}
    for method in ("ditto", "none"):
        experiment = tiny_experiment(personal={"method": method}, strategy={"name": strategy})
        token = RUN if method == "ditto" else "00000000000000a8"
        instructions = [replace(asked(experiment, number), run=token) for number in (1, 2)]
        replies[method] = [
            answer(instruction, config, UNRESTRICTED) for instruction in instructions for answer in (train_round, evaluate_round)
        ]
    for with_own, without in zip(replies["ditto"], replies["none"], strict=True):
        extra = with_own.metric_records.pop("personal", None)
        assert without_times(with_own) == without_times(without)
        if extra is not None:
            own = Statistics.from_numbers(dict(extra), classes=2)
            assert own.n == dict(without.metric_records["metrics"])["num-examples"] and own.n > 0
    assert PersonalModels.of(config.work_dir, RUN).before(9) is not None


def evaluated(config: SiteConfig, policy: Mapping[str, Any], **changes: Any) -> RecordDict:
    """The evaluation reply after a round of training at a site without rules, under `policy`."""
    experiment = ditto(**changes)
    train_round(asked(experiment, 1), config, UNRESTRICTED)
    file = Path(config.work_dir) / "policy.yaml"
    file.write_text(yaml.safe_dump(dict(policy)))
    values = {"min_patients": 1, "min_validation_patients": 2, **policy}
    return evaluate_round(asked(experiment, 1), config.model_copy(update={"policy": str(file)}), build_config(SitePolicy, values))


def test_an_answer_about_the_own_model_is_named_in_the_audit_log(config: SiteConfig) -> None:
    named = describe_content(evaluated(config, {}))["metrics"]
    assert {"personal index", "personal value", "index"} <= set(named)


@pytest.mark.parametrize(
    ("policy", "leaves"),
    [
        ({}, True),
        ({"withhold": ["validation_statistics"]}, False),
        ({"max_epsilon": 100.0}, False),
        ({"max_epsilon": 100.0, "open_statistics": True}, True),
        ({"min_validation_patients": 1000}, False),
        ({"max_evaluations_per_data": 1}, False),
        ({"max_evaluations_per_day": 1}, False),
        ({"max_evaluations_per_data": 2}, True),
    ],
)
def test_statistics_of_the_own_model_are_one_more_answer_under_the_policy(
    config: SiteConfig, policy: Mapping[str, Any], leaves: bool
) -> None:
    evaluation = unpack_evaluation(evaluated(config, policy))
    assert (evaluation.personal is not None) == leaves
    counted = "max_evaluations" in "".join(policy)
    assert (evaluation.num_examples > 0) == (leaves or counted)  # the global model's answer goes without the other


def test_the_own_models_scores_are_as_coarse_as_the_global_ones(config: SiteConfig) -> None:
    numbers = there(unpack_evaluation(evaluated(config, {"score_bins": 64})).personal)
    occupied = Statistics.from_numbers(numbers, classes=2).histograms[0].any(axis=0)[1:-1]
    assert set(np.flatnonzero(occupied) % (2048 // 64)) == {0}


@pytest.mark.parametrize("open_metrics", [True, False])
def test_a_private_run_tells_of_the_own_model_only_with_its_open_metrics(config: SiteConfig, open_metrics: bool) -> None:
    private = {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "expected_batch_size": 4, "open_metrics": open_metrics}
    changes = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}, "privacy": private}
    evaluation = unpack_evaluation(evaluated(config, {"min_patients_private": 2, "min_validation_patients": 1}, **changes))
    assert evaluation.num_examples > 0
    assert (evaluation.personal is not None) == open_metrics
