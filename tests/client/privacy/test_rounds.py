"""A private round at a site: what leaves, what is counted, and that no two questions share their noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.client.app import train_round
from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.models.build import build_model
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays, Update, unpack_update
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import TinyFederation, tiny_experiment

PRIVATE = {"mechanism": "dp_sgd", "noise_multiplier": 2.0, "delta": 1e-3, "expected_batch_size": 4}
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1.0}


def private(**privacy: Any) -> ExperimentConfig:
    return tiny_experiment(
        model={"norm": "group"}, loss={"logit_adjustment": False}, training=SGD, privacy={**PRIVATE, **privacy}
    )


@pytest.fixture
def federation(tmp_path: Path) -> TinyFederation:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return TinyFederation(tmp_path, sites=1, patients=12)


def ask(federation: TinyFederation, experiment: ExperimentConfig, run: str = "run", number: int = 1, seed: int = 3) -> Update:
    """The update of site 0, whose first weights are those of `seed`."""
    content = train_round(instruct(experiment, run, number, seed), config_of(federation), UNRESTRICTED)
    return unpack_update(content, arrays_of(experiment, seed))


def instruct(experiment: ExperimentConfig, run: str, number: int, seed: int) -> Instruction:
    return Instruction(experiment, run, number, arrays_of(experiment, seed))


def arrays_of(experiment: ExperimentConfig, seed: int) -> ModelArrays:
    model = build_model(experiment.model, experiment.task, seed)
    return ModelArrays(*ArraysLayout.of(model).flatten(model))


def config_of(federation: TinyFederation) -> Any:
    return read_site_config(federation.sites / "0.yaml")


def moved(update: Update, experiment: ExperimentConfig, seed: int = 3) -> np.ndarray:
    return update.arrays.parameters - arrays_of(experiment, seed).parameters


def test_nothing_of_the_raw_data_is_among_the_metrics_unless_the_run_says_so(federation: TinyFederation) -> None:
    shut, open_ = ask(federation, private()).metrics, ask(federation, private(open_metrics=True)).metrics
    assert set(shut) == {"steps", "learning_rate", "train_sec", "epsilon", "noise_multiplier"}
    assert set(open_) - set(shut) == {"train_loss", "train_accuracy", "images_per_sec"}
    assert shut["noise_multiplier"] == 2.0
    assert shut["epsilon"] > 0


def test_epsilon_grows_over_rounds_and_each_round_is_in_the_ledger(federation: TinyFederation) -> None:
    first, second = (ask(federation, private(), number=number).metrics["epsilon"] for number in (1, 2))
    assert 0 < first < second
    assert sum(len(lineage.entries) for lineage in open_ledger(config_of(federation)).lineages()) == 2


def test_the_same_question_gets_the_same_answer(federation: TinyFederation) -> None:
    one, same = (ask(federation, private()).arrays.parameters for _ in range(2))
    np.testing.assert_array_equal(one, same)


def test_any_other_question_gets_independent_noise(federation: TinyFederation) -> None:
    """Else two answers could be subtracted, and the noise with them."""
    experiment = private()
    base = moved(ask(federation, experiment), experiment)
    others = {
        "round": moved(ask(federation, experiment, number=2), experiment),
        "run": moved(ask(federation, experiment, run="other"), experiment),
        "weights": moved(ask(federation, experiment, seed=4), experiment, seed=4),
        "settings": moved(ask(federation, private(max_grad_norm=1.01)), experiment),
    }
    plateau = experiment.training.model_copy(update={"schedule": "plateau"})
    falling = experiment.model_copy(update={"training": plateau, "rounds": 6})
    content = train_round(replace(instruct(falling, "run", 1, 3), rate_factor=0.5), config_of(federation), UNRESTRICTED)
    lower, full = moved(unpack_update(content, arrays_of(falling, 3)), falling), moved(ask(federation, falling), falling)
    assert abs(np.corrcoef(lower, full)[0, 1]) < 0.05
    path = Path(config_of(federation).manifest)
    leaving = load_site(config_of(federation), experiment).train.patients[0]
    write_manifest(Manifest(tuple(record for record in read_manifest(path).records if record.patient != leaving)), path)
    others["data"] = moved(ask(federation, experiment), experiment)
    (path.parent / NOISE_KEY_FILE).unlink()
    others["secret"] = moved(ask(federation, experiment), experiment)
    correlations = {name: abs(np.corrcoef(base, other)[0, 1]) for name, other in others.items()}
    assert max(correlations.values()) < 0.05, correlations


@pytest.mark.parametrize("secure", [False, True])
def test_a_private_study_runs_over_the_grid(tmp_path: Path, secure: bool) -> None:
    experiment = tiny_experiment(
        rounds=2,
        model={"norm": "group", "weight_standardization": True},
        loss={"logit_adjustment": False},
        strategy={"name": "fedprox"},
        privacy={**PRIVATE, "unit": "patient", "augmentation_multiplicity": 2, "ema_decay": 0.5, "secure_noise": secure},
    )
    summary = TinyFederation(tmp_path, sites=2, patients=12).run("private", experiment)
    assert summary.rounds_completed == 2
