"""Promise: data sets that differ by one patient differ by one unit. Attack: a patient who leaves, and a seed that the run chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.data.splits import split_by_key
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE, load_site, read_site_config
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.manifest import Manifest
from tests.adversary.hospital import Hospital, private_experiment
from tests.tiny import TinyFederation, tiny_experiment

PATIENTS = st.lists(st.text(max_size=6), min_size=1, max_size=30)


def sides(patients: list[str], share: float, key: bytes) -> dict[str, bool]:
    train, validation = split_by_key(patients, share, key)
    assert sorted([*train, *validation]) == list(range(len(patients)))
    return {patients[row]: False for row in train} | {patients[row]: True for row in validation}


@given(PATIENTS, st.floats(0.0, 0.99), st.binary(min_size=32, max_size=32), st.data())
def test_who_leaves_moves_nobody_else(patients: list[str], share: float, key: bytes, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(patients))
    before = sides(patients, share, key)
    del before[gone]
    assert sides([patient for patient in patients if patient != gone], share, key) == before


def test_the_share_is_kept_and_another_key_draws_others() -> None:
    patients = [f"p{number}" for number in range(4000)]
    first, other = (sides(patients, 0.1, bytes([number]) * 32) for number in range(2))
    for drawn in (first, other):
        assert sum(drawn.values()) == pytest.approx(400, abs=5 * (4000 * 0.09) ** 0.5)
    assert sum(first[patient] and other[patient] for patient in patients) == pytest.approx(40, abs=35)


def validation_of(hospital: Hospital, experiment: ExperimentConfig) -> set[str]:
    return set(load_site(hospital.config, experiment).validation.patients)


def test_no_seed_of_the_run_chooses_who_is_asked_about(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 30)
    drawn = [
        validation_of(hospital, tiny_experiment(seed=seed, training={"split_seed": other}))
        for seed, other in ((0, None), (1, None), (2, 7))
    ]
    assert drawn[0] == drawn[1] == drawn[2] != set()
    key = Path(hospital.config.work_dir) / SPLIT_KEY_FILE
    assert len(key.read_bytes()) == 32 and key.stat().st_mode & 0o777 == 0o600


def test_of_a_hospital_and_of_a_private_simulation_neighbours_differ_by_one_patient(tmp_path: Path) -> None:
    """Each data set is drawn afresh: no memory of an earlier one helps."""
    hospital = Hospital(tmp_path / "real", 24)
    virtual = TinyFederation(tmp_path / "virtual", sites=1, patients=24)
    key = Path(hospital.config.work_dir) / SPLIT_KEY_FILE
    validation_of(hospital, tiny_experiment())
    secret = key.read_bytes()
    whole = hospital.manifest
    for experiment, config in (
        (tiny_experiment(), hospital.config),
        (private_experiment(), read_site_config(virtual.sites / "0.yaml")),
    ):
        found = {}
        for gone in (None, *sorted(set(whole.patients))[:6]):
            work = tmp_path / f"work-{config.name}-{experiment.privacy.mechanism}-{gone}"
            work.mkdir()
            (work / SPLIT_KEY_FILE).write_bytes(secret)
            (work / SPLIT_KEY_FILE).chmod(0o600)
            hospital.change(Manifest(tuple(record for record in whole.records if record.patient != gone)))
            site = load_site(config.model_copy(update={"work_dir": str(work), "manifest": hospital.config.manifest}), experiment)
            found[gone] = set(site.train.patients), set(site.validation.patients)
        for gone, (train, validation) in found.items():
            assert (train, validation) == tuple(side - {gone} for side in found[None])


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.049])
def test_no_run_chooses_a_share_that_leaves_one_patient(tmp_path: Path, share: float) -> None:
    hospital = Hospital(tmp_path, 30)
    asked = tiny_experiment(training={"validation_fraction": share})
    for kind in ("query", "evaluate", "train"):
        assert hospital.refusal(kind, asked) == "the site's policy refuses this (min_validation_share)"
    hospital.set_policy(max_validation_share=0.2)
    assert hospital.refusal("query", tiny_experiment()) == "the site's policy refuses this (max_validation_share)"


def test_sides_that_were_drawn_by_a_seed_stay(tmp_path: Path) -> None:
    """Of a run that goes on from a model which was trained before the hospital had a key."""
    hospital = Hospital(tmp_path, 24)
    former = hospital.config.model_copy(update={"policy": None})
    before = set(load_site(former, tiny_experiment()).validation.patients)
    assert validation_of(hospital, tiny_experiment()) == before
    assert validation_of(hospital, tiny_experiment(seed=9)) != before
