"""Sums of clinical numbers: what a site tells under which policy, and that a run standardises by them as pooled data would."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from pneumofed.client.app import app
from pneumofed.client.federation.clinical_sums import sum_columns
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.config.experiment import ClinicalConfig, ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.errors import MessageError
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE, data_fingerprint
from pneumofed.common.wire.clinical_sums import ColumnSums, pack_sums, standardize, unpack_sums
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import read_failure
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.adversary.hospital import GROUP, Hospital
from tests.server.federation.test_central_privacy import CENTRAL
from tests.tiny import TinyFederation, tiny_experiment

CLINICAL: dict[str, Any] = {
    "columns": [
        {"name": "temperature", "unit": "°C", "low": 34, "high": 43},
        {"name": "crp", "unit": "mg/L", "low": 0, "high": 600},
        {"name": "smoker", "kind": "binary"},
    ]
}


def experiment_of(**changes: Any) -> ExperimentConfig:
    return tiny_experiment(clinical=CLINICAL, **changes)


def schema_of(experiment: ExperimentConfig) -> ClinicalConfig:
    assert experiment.clinical is not None
    return experiment.clinical


def with_values(manifest: Manifest, seed: int, crp_of: int = 10_000) -> Manifest:
    """Temperature of everybody, the same on both images; CRP of the first `crp_of` patients."""
    rng, patients = np.random.default_rng(seed), list(dict.fromkeys(manifest.patients))
    drawn = {who: (round(float(rng.normal(37.5 + seed / 10, 0.6)), 2), round(float(rng.gamma(2.0, 30.0)), 1)) for who in patients}
    found = []
    for record in manifest.records:
        temperature, crp = drawn[record.patient]
        others = [("temperature", str(temperature)), ("smoker", "no")]
        others += [("crp", str(crp))] if patients.index(record.patient) < crp_of else []
        found.append(replace(record, others=tuple(others)))
    return Manifest(tuple(found))


def hospital_with_values(folder: Path, crp_of: int = 10_000, **policy: Any) -> Hospital:
    hospital = Hospital(folder, 60, **policy)
    hospital.change(with_values(hospital.manifest, 0, crp_of))
    return hospital


def ask(hospital: Hospital, experiment: ExperimentConfig, run: str = "one") -> Message:
    asked = Instruction(experiment, hashlib.sha256(run.encode()).hexdigest()[:16], 0, clinical=True)
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(hospital.federation.sites)})
    return app(Message(pack_instruction(asked), dst_node_id=5, message_type="query"), context)


def told(hospital: Hospital, experiment: ExperimentConfig) -> dict[str, ColumnSums]:
    return unpack_sums(ask(hospital, experiment).content, schema_of(experiment))[1]


def test_sums_are_those_of_patients_and_small_cells_are_hidden(tmp_path: Path) -> None:
    hospital, experiment = hospital_with_values(tmp_path, crp_of=12), experiment_of()
    found, site = told(hospital, experiment), load_site(hospital.config, experiment)
    assert set(found) == {"temperature"}  # CRP of fewer than twenty, smoker is no number
    assert hospital.audit[-1].event == "answer" and hospital.audit[-1].facts["sums"] == ["temperature"]
    assert site.train.clinical is not None
    first = {who: row for row, who in reversed(list(enumerate(site.train.patients)))}
    known = site.train.clinical[list(first.values()), 0].astype(np.float64)
    assert found["temperature"].patients == len(known)
    stated = standardize(schema_of(experiment), [found]).columns[0]
    assert (stated.mean, stated.deviation) == pytest.approx((known.mean(), known.std()), rel=1e-6)


@pytest.mark.parametrize(("policy", "rule"), [({"withhold": ["data_report"]}, "withhold"), ({"max_epsilon": 8.0}, "max_epsilon")])
def test_a_policy_keeps_sums_back_and_the_audit_log_says_by_which_rule(tmp_path: Path, policy: dict[str, Any], rule: str) -> None:
    hospital = hospital_with_values(tmp_path, **policy)
    assert ask(hospital, experiment_of()).has_error()
    last = hospital.audit[-1]
    assert (last.event, last.facts["rule"], last.facts["clinical"]) == ("refusal", rule, "sums of numbers")


def test_a_patient_who_joins_waits_so_that_two_answers_tell_nobody_apart(tmp_path: Path) -> None:
    hospital, experiment = hospital_with_values(tmp_path), experiment_of()
    before, all_records = told(hospital, experiment), hospital.manifest.records
    extra = tuple(replace(record, patient=f"new {record.patient}") for record in all_records[:2])
    hospital.change(Manifest((*all_records[2:], *extra)))
    assert read_failure(ask(hospital, experiment)).error == "PolicyError"
    hospital.change(Manifest(all_records))
    assert told(hospital, experiment) == before


def test_noised_sums_are_paid_for_once_and_are_the_same_each_time(tmp_path: Path) -> None:
    hospital, experiment = hospital_with_values(tmp_path, count_noise=0.5), experiment_of()
    first = told(hospital, experiment)
    assert told(hospital, experiment) == first
    exact = sum_columns(load_site(hospital.config, experiment).train, schema_of(experiment))
    assert first and all(one.patients != exact[name].patients for name, one in first.items())
    entries = [recorded.entry for lineage in open_ledger(hospital.config).lineages() for recorded in lineage.entries]
    assert [(entry.purpose, entry.mechanism.noise_multiplier) for entry in entries].count(("counts", 0.5)) == 1


def test_another_key_of_the_noise_is_another_release_and_is_paid_for(tmp_path: Path) -> None:
    hospital, experiment = hospital_with_values(tmp_path, count_noise=0.5), experiment_of()
    first = told(hospital, experiment)
    (Path(hospital.config.work_dir) / NOISE_KEY_FILE).unlink()
    assert told(hospital, experiment) != first
    assert [len(lineage.entries) for lineage in open_ledger(hospital.config).lineages()] == [2]


def test_noise_covers_what_a_patient_can_change(tmp_path: Path) -> None:
    """|(1, u, u^2)| of two columns is at most sqrt(6), and an exchanged image moves (u, u^2) by sqrt(5) a column at most."""
    u = np.linspace(-1.0, 1.0, 201)
    assert np.sqrt(2 * (1 + u**2 + u**4)).max() <= np.sqrt(6) + 1e-12
    moved = (u[:, None] - u) ** 2 + (u[:, None] ** 2 - u**2) ** 2
    assert moved.max() <= 5.0


@pytest.mark.parametrize(
    "changes",
    [
        {**GROUP, "privacy": {"mechanism": "dp_sgd"}},
        {"secure_aggregation": {"enabled": True}},
        CENTRAL,
    ],
)
def test_private_and_masked_runs_ask_no_data_and_a_site_tells_them_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    experiment = experiment_of(**changes)
    assert not experiment.asks_clinical_sums
    assert read_failure(ask(hospital_with_values(tmp_path), experiment)).error == "MessageError"


@pytest.mark.parametrize(
    "sums",
    [
        {"temperature": ColumnSums(9.0, 0.0, 1.0)},
        {"temperature": ColumnSums(20.0, 21.0, 1.0)},
        {"temperature": ColumnSums(20.0, 1.0, -1.0)},
        {"temperature": ColumnSums(20.0, float("nan"), 1.0)},
        {"smoker": ColumnSums(20.0, 1.0, 1.0)},
    ],
)
def test_sums_that_no_patients_have_are_refused(sums: dict[str, ColumnSums]) -> None:
    with pytest.raises(MessageError, match="clinical sums"):
        unpack_sums(pack_sums("site-0", sums), build_config(ClinicalConfig, CLINICAL))


def test_a_run_standardises_by_all_sites_together_and_no_site_moves_it(tmp_path: Path) -> None:
    federation, experiment = TinyFederation(tmp_path, sites=3, patients=24), experiment_of()
    for number in range(2):  # the third site has no column at all, and takes part
        path = federation.sites / f"site-{number}" / "manifest.csv"
        write_manifest(with_values(read_manifest(path), number), path)
    summary = federation.run("run", experiment)
    sites = [load_site(read_site_config(federation.sites / f"{number}.yaml"), experiment) for number in range(3)]
    patients = [
        dict(zip(site.train.patients, site.train.clinical[:, 0], strict=True))
        for site in sites
        if site.train.clinical is not None
    ]
    pooled = np.array([value for one in patients for value in one.values() if np.isfinite(value)], np.float64)
    checkpoint = read_checkpoint(RunFolder(tmp_path / "run").last_checkpoint)
    mean, deviation = checkpoint.arrays.statistics[-6], checkpoint.arrays.statistics[-3]
    assert (mean, deviation) == pytest.approx((pooled.mean(), pooled.std()), rel=1e-6)
    assert summary.rounds_completed == 2 and np.isnan(sites[2].train.clinical).all()  # type: ignore[arg-type]
    assert set(RunFolder(tmp_path / "run").read_history()[-1].sites) == {"site-0", "site-1", "site-2"}


def test_the_key_of_private_noise_depends_on_the_values(tmp_path: Path) -> None:
    hospital, experiment = hospital_with_values(tmp_path), experiment_of()
    site = load_site(hospital.config, experiment)
    assert site.train.clinical is not None
    other = site.train.clinical.copy()
    other[0, 0] += 0.01
    prints = {data_fingerprint(replace(site.train, clinical=one)) for one in (None, site.train.clinical, other)}
    assert len(prints) == 3


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_a_private_run_with_values_trains(tmp_path: Path, fusion: str) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=24)
    path = federation.sites / "site-0" / "manifest.csv"
    write_manifest(with_values(read_manifest(path), 0), path)
    privacy = {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "expected_batch_size": 8}
    experiment = tiny_experiment(clinical={**CLINICAL, "fusion": fusion}, rounds=1, **GROUP, privacy=privacy)
    assert federation.run("run", experiment).rounds_completed == 1
    statistics = read_checkpoint(RunFolder(tmp_path / "run").last_checkpoint).arrays.statistics
    assert statistics.tolist() == [38.5, 300.0, 0.5, 4.5, 300.0, 0.5]  # the ranges', of which nothing is paid
