"""Promise: statistics of validation patients tell nothing of one patient. Attack: exact answers about one, and about all but one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.client.federation.evaluations import (
    EVALUATIONS_FILE,
    Version,
    admit_evaluation,
    choose_version,
    coarsen,
    read_evaluations,
)
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.site_data import load_site
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport, Manifest
from pneumofed.common.errors import PolicyError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, FIXED_POINT, Statistics
from pneumofed.common.wire.messages import unpack_presence, unpack_update
from tests.adversary.hospital import Hospital, private_experiment
from tests.client.federation.test_clinical_sums import experiment_of, hospital_with_values
from tests.client.privacy.test_rounds import arrays_of
from tests.tiny import draw_manifest, tiny_experiment

HALF = tiny_experiment(training={"validation_fraction": 0.45})
ASKED = RunRequest.of(HALF, "evaluate", "run", 1)
NOON = datetime(2026, 3, 2, 12).astimezone()


def test_under_a_limit_of_epsilon_no_statistics_leave(tmp_path: Path) -> None:
    """The README's policy: nothing that comes from the raw data without noise, and the ledger need count none."""
    hospital = Hospital(tmp_path, 60, max_epsilon=6, min_unit="patient")
    for number in range(1, 4):
        found = hospital.statistics(private_experiment(), number=number, seed=number)
        assert found == Statistics.zero(2)
    assert open_ledger(hospital.config).lineages() == []
    answer = [line for line in hospital.audit if line.event == "answer"]
    assert len(answer) == 3


def test_a_run_cannot_open_the_metrics_of_a_hospital_with_a_limit(tmp_path: Path) -> None:
    experiment = private_experiment(open_metrics=True)
    hospital = Hospital(tmp_path, 40, max_epsilon=30, min_unit="patient")
    update = unpack_update(hospital.ask("train", experiment).content, arrays_of(experiment, 3))
    assert set(update.metrics) == {"steps", "learning_rate", "train_sec", "epsilon", "noise_multiplier"}
    report = unpack_presence(hospital.ask("query", experiment).content).report
    assert set(report) == {"train", "validation", "withheld"}
    hospital.set_policy(max_epsilon=30, min_unit="patient", open_statistics=True)
    update = unpack_update(hospital.ask("train", experiment, run="run-2").content, arrays_of(experiment, 3))
    assert "train_loss" in update.metrics


def test_of_few_patients_nothing_leaves(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 20)
    assert hospital.statistics(HALF).n == 0
    assert not (Path(hospital.config.work_dir) / EVALUATIONS_FILE).exists()
    hospital.set_policy(min_validation_patients=3)
    assert hospital.statistics(HALF).n > 0


def test_questions_are_counted_and_end(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60, max_evaluations_per_day=3)
    assert [hospital.refusal("evaluate", HALF, seed=seed) for seed in range(4)] == [
        *[""] * 3,
        "the site's policy refuses this (max_evaluations_per_day)",
    ]
    hospital.set_policy(max_evaluations_per_data=3)
    assert hospital.refusal("evaluate", HALF, run="other") == "the site's policy refuses this (max_evaluations_per_data)"
    assert read_evaluations(Path(hospital.config.work_dir)).versions[0].answers == 3
    (Path(hospital.config.work_dir) / EVALUATIONS_FILE).write_text("[]")
    assert hospital.refusal("evaluate", HALF, run="other") == "the site's policy refuses this (min_validation_patients)"


def test_scores_leave_on_a_coarse_grid(tmp_path: Path) -> None:
    found = Hospital(tmp_path, 60).statistics(HALF)
    unit = FIXED_POINT // 512
    assert found.n > 0 and np.all(found.losses % unit == 0)
    occupied = np.flatnonzero(found.histograms.sum(axis=(0, 1)))
    assert np.all((occupied - 1) % 4 == 0)


def test_one_patient_more_or_less_changes_no_answer_by_that_patient(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    before = hospital.statistics(HALF)
    whole = hospital.manifest
    extra = draw_manifest(tmp_path / "joined", 30, seed=77)
    hospital.change(Manifest((*whole.records, *extra.records[:20])))  # ten join, some of them in validation: they wait
    assert hospital.statistics(HALF) == before
    hospital.change(Manifest((*whole.records, *draw_manifest(tmp_path / "many", 60, seed=78).records)))
    after = hospital.statistics(HALF)
    assert after.n >= before.n + 2 * 20
    leaving = load_site(hospital.config, HALF).validation.patients[0]
    hospital.change(Manifest(tuple(record for record in hospital.manifest.records if record.patient != leaving)))
    for seed in range(2):
        refused = hospital.refusal("evaluate", HALF, seed=seed)
        assert refused == "the site's policy refuses this (min_validation_patients)"


# --- the rule by itself -----------------------------------------------------------------------------------------------------------

SETS = st.sets(st.integers(0, 60), min_size=20, max_size=60)


def dataset(patients: Sequence[int], sick: frozenset[int] = frozenset()) -> Dataset:
    names = tuple(f"p{number}" for number in sorted(patients))
    labels = np.array([int(number in sick) for number in sorted(patients)], dtype=np.int64)
    return Dataset(np.zeros((len(names), 2, 2), np.uint8), labels, names, names, DataReport())


def policy(**values: Any) -> SitePolicy:
    return build_config(SitePolicy, values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SETS, st.frozensets(st.integers(0, 60))), min_size=1, max_size=8))
def test_no_two_answers_are_told_apart_by_fewer_patients_than_the_policy_asks(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[set[int], frozenset[int]]]
) -> None:
    work = tmp_path_factory.mktemp("work")
    answered: list[set[tuple[str, int]]] = []
    for patients, sick in history:
        try:
            found = admit_evaluation(dataset(sorted(patients), sick), ASKED, policy(), work, NOON)
        except PolicyError as refusal:
            assert refusal.rule == "min_validation_patients"
            continue
        states = set(zip(found.patients, found.labels.tolist(), strict=True))
        assert len(states) >= 20
        for other in answered:
            differing = {patient for patient, _ in states ^ other}
            assert not differing or len(differing) >= 20
        answered.append(states)


def test_another_class_of_one_sick_patient_closes_the_question_whatever_the_task(tmp_path: Path) -> None:
    hospital, three = Hospital(tmp_path, 60), tiny_experiment(task="three_class", training={"validation_fraction": 0.45})
    words, patients = ("normal", "bacterial", "viral"), list(dict.fromkeys(hospital.manifest.patients))
    labels = {patient: words[number % 3] for number, patient in enumerate(patients)}
    hospital.change(Manifest(tuple(replace(one, label=labels[one.patient]) for one in hospital.manifest.records)))
    assert not hospital.ask("evaluate", three).has_error()
    site = load_site(hospital.config, three)
    changed = next(who for who in site.validation.patients if labels[who] == "bacterial")
    hospital.change(
        Manifest(tuple(replace(one, label="viral") if one.patient == changed else one for one in hospital.manifest.records))
    )
    for task in (three, HALF):
        assert "min_validation_patients" in hospital.refusal("evaluate", task, run=task.task if task is three else "other")


def test_other_values_of_one_patient_close_the_question_to_runs_that_use_values_only(tmp_path: Path) -> None:
    hospital, using = hospital_with_values(tmp_path), experiment_of(training={"validation_fraction": 0.45})
    before = hospital.statistics(HALF, run="plain")
    assert hospital.statistics(using, run="using").n == before.n
    changed = load_site(hospital.config, using).validation.patients[0]
    others = (("temperature", "42.9"), ("smoker", "yes"))
    records = [replace(one, others=others) if one.patient == changed else one for one in hospital.manifest.records]
    hospital.change(Manifest(tuple(records)))
    assert "min_validation_patients" in hospital.refusal("evaluate", using, run="using")
    assert hospital.statistics(HALF, run="plain") == before


def test_an_answer_is_counted_before_it_is_given_and_forgotten_after_a_day(tmp_path: Path) -> None:
    data, rules = dataset(range(30)), policy(max_evaluations_per_day=1)
    admit_evaluation(data, ASKED, rules, tmp_path, NOON)
    with pytest.raises(PolicyError):
        admit_evaluation(data, ASKED, rules, tmp_path, NOON + timedelta(hours=23))
    admit_evaluation(data, ASKED, rules, tmp_path, NOON + timedelta(hours=25))
    assert "p1" not in (tmp_path / EVALUATIONS_FILE).read_text()
    assert (tmp_path / EVALUATIONS_FILE).stat().st_mode & 0o777 == 0o600


def test_who_joins_waits_and_who_leaves_closes_the_question() -> None:
    before = {f"p{number}": "a" for number in range(30)}
    known = [Version(before, 4)]
    assert choose_version(known, {**before, "new": "a"}, 20) is known[0]
    with pytest.raises(PolicyError, match="1 validation patients left or changed"):
        choose_version(known, {**before, "p3": "b"}, 20)
    assert choose_version(known, {f"q{number}": "a" for number in range(30)}, 20).answers == 0


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("bins", [SitePolicy().score_bins, 1024])
def test_the_coarse_grid_costs_less_than_a_thousandth_of_auroc(spread: float, bins: int) -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random(4000) < 0.6).astype(np.int64)
    logits = spread * (generator.normal(size=4000) + 2.0 * labels - 1.0)
    positive = 1.0 / (1.0 + np.exp(-logits))
    fine = Statistics.of(Predictions(np.stack([1 - positive, positive], 1), labels, ("p",) * 4000), FEDERATED_GRID)
    coarse = coarsen(fine, bins)
    assert Statistics.from_numbers(coarse.to_numbers(), classes=2) == coarse  # the coordinator takes it
    exact, found = metrics(fine, 0.5), metrics(coarse, 0.5)
    for name in ("auroc", "sensitivity", "specificity", "brier", "log_loss"):
        assert found[name] == pytest.approx(exact[name], abs=1e-3), name
    assert coarsen(fine, 2048) is fine


def test_coarse_statistics_of_any_images_are_taken_by_the_coordinator() -> None:
    generator = np.random.default_rng(1)
    for number in range(200):
        size = int(generator.integers(1, 40))
        scores = generator.choice([0.0, 1.0, 1 / 15, 0.5, 1e-12, float(generator.random())], size)
        labels = generator.integers(0, 2, size)
        found = Statistics.of(Predictions(np.stack([1 - scores, scores], 1), labels, ("p",) * size), FEDERATED_GRID)
        coarse = coarsen(found, (64, 256, 1024)[number % 3])
        assert Statistics.from_numbers(coarse.to_numbers(), classes=2) == coarse
    assert replace(found) == found
