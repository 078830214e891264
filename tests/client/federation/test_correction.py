"""The correction of a site's gradients: what is kept of it, when it counts, and what it does to a step."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pneumofed.client.federation.correction import SiteCorrection
from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.choices import StrategyName
from pneumofed.common.errors import DataError, MessageError
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.recipe import gradient_weight
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.client.federation.test_training import tiny_data
from tests.tiny import there, tiny_experiment

RUN, IMAGES = "00000000000000a7", 20
SGD = {"optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 0.0, "momentum": 0.0}


def experiment_of(name: StrategyName = "scaffold"):  # type: ignore[no-untyped-def]
    return tiny_experiment(rounds=9, strategy={"name": name}, training=SGD)


LAYOUT = ArraysLayout.of(build_model(experiment_of().model, "binary", seed=0))


def filled(value: float) -> np.ndarray:
    return np.full(LAYOUT.parameter_count, value, np.float32)


def instruct(number: int, counted: int, name: StrategyName = "scaffold", variate: float | None = None) -> Instruction:
    arrays = ModelArrays(filled(1.0), np.zeros(LAYOUT.statistic_count, np.float32))
    sent = None if variate is None else filled(variate)
    return Instruction(experiment_of(name), RUN, number, arrays, counted=counted, variate=sent)


def read(folder: Path, instruction: Instruction) -> SiteCorrection:
    return there(SiteCorrection.read(instruction, str(folder), LAYOUT))


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("corrections/*/*.npy"))


def test_other_strategies_have_no_correction_and_leave_no_file(tmp_path: Path) -> None:
    plain = Instruction(tiny_experiment(), RUN, 1)
    assert SiteCorrection.read(plain, str(tmp_path), LAYOUT) is None
    assert not list(tmp_path.iterdir())


def test_scaffolds_variate_is_the_mean_gradient_of_the_round_and_feddyns_the_pull_at_its_end(tmp_path: Path) -> None:
    weight = gradient_weight(experiment_of(), 1, IMAGES)
    read(tmp_path, instruct(1, 0, variate=0.25)).keep(filled(1.0 - 3.0 * weight), IMAGES)
    again = read(tmp_path, instruct(2, 1, variate=0.5))
    np.testing.assert_allclose(again.own, 3.0 - 0.25, rtol=1e-5)
    np.testing.assert_allclose(again.added, 0.5 - (3.0 - 0.25), rtol=1e-5)
    other = tmp_path / "other"
    read(other, instruct(1, 0, "feddyn")).keep(filled(1.5), IMAGES)
    np.testing.assert_allclose(read(other, instruct(2, 1, "feddyn")).added, 0.01 * 0.5, rtol=1e-5)


def test_a_round_that_was_not_counted_leaves_no_trace(tmp_path: Path) -> None:
    read(tmp_path, instruct(1, 0)).keep(filled(0.0), IMAGES)
    before = read(tmp_path, instruct(2, 1))
    before.keep(filled(5.0), IMAGES)
    after = read(tmp_path, instruct(3, 1))
    np.testing.assert_array_equal(after.own, before.own)
    after.keep(filled(6.0), IMAGES)
    assert kept(tmp_path) == [1, 3]
    assert not read(tmp_path, instruct(4, 0)).own.any()


def test_a_repeated_round_starts_as_it_did_and_two_counted_rounds_stay_for_it(tmp_path: Path) -> None:
    for number in range(1, 5):
        read(tmp_path, instruct(number, number - 1)).keep(filled(float(number)), IMAGES)
    assert kept(tmp_path) == [2, 3, 4]
    third = read(tmp_path, instruct(4, 3)).own
    repeated = read(tmp_path, instruct(3, 2))
    repeated.keep(filled(3.0), IMAGES)
    np.testing.assert_array_equal(read(tmp_path, instruct(4, 3)).own, third)
    assert kept(tmp_path) == [2, 3]


def test_only_the_site_may_read_its_folder(tmp_path: Path) -> None:
    read(tmp_path, instruct(1, 0)).keep(filled(0.0), IMAGES)
    (file,) = tmp_path.glob("corrections/*/*.npy")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"x"), lambda file: file.write_bytes(b"")]
)
def test_a_lost_correction_ends_the_sites_part_with_a_sentence(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    read(tmp_path, instruct(1, 0)).keep(filled(0.0), IMAGES)
    (file,) = tmp_path.glob("corrections/*/*.npy")
    damage(file)
    with pytest.raises(DataError, match="restore the site's work folder from a backup, or sit this run out"):
        read(tmp_path, instruct(2, 1))


def test_a_variate_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MessageError, match="is expected"):
        read(tmp_path, replace(instruct(1, 0), variate=np.zeros(3, np.float32)))


def test_each_step_of_sgd_is_moved_by_the_correction(tmp_path: Path) -> None:
    """One step of a round: the weights with and without the correction differ by rate times the correction."""
    experiment = experiment_of().model_copy(update={"training": experiment_of().training.model_copy(update={"batch_size": 64})})
    ends = []
    for variate in (None, 0.75):
        model = build_model(experiment.model, experiment.task, seed=1)
        plan = RoundPlan(experiment, 1, "site")
        setup = build_setup(model, [10, 10], plan, build_compute("cpu", "fp32", threads=1))
        read(tmp_path, replace(instruct(1, 0, variate=variate), experiment=experiment)).steer(setup)
        train_locally(setup, tiny_data(IMAGES), plan)
        ends.append(LAYOUT.flatten(model)[0])
    np.testing.assert_allclose(ends[0] - ends[1], 0.75 * gradient_weight(experiment, 1, IMAGES), atol=1e-6)
