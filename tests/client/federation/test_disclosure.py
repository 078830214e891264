"""What leaves a site besides its update: the hospital's policy keeps it back, noises it, or lets it go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pneumofed.client.federation.policy import UNRESTRICTED, policy_of
from pneumofed.client.federation.requests import Disclosure
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.errors import BudgetError
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE
from pneumofed.server.report.course import describe_privacy
from pneumofed.server.report.read_run import read_run
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from tests.tiny import TinyFederation, draw_manifest, there, tiny_experiment


def with_policy(federation: TinyFederation, number: int, **policy: Any) -> Path:
    """The site's configuration file, which now names a policy."""
    path = federation.sites / f"{number}.yaml"
    policy_file = federation.folder / f"policy-{number}.yaml"
    policy_file.write_text(yaml.safe_dump({"min_patients": 1, "min_validation_patients": 1, **policy}))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "policy": str(policy_file)}))
    return path


def released(path: Path, experiment: ExperimentConfig) -> Disclosure:
    config = read_site_config(path)
    return Disclosure.of(load_site(config, experiment), experiment, policy_of(config))


def lines_of(tmp_path: Path, federation: TinyFederation) -> RoundRecord:
    federation.run("run", tiny_experiment(rounds=1))
    (line,) = RunFolder(tmp_path / "run").read_history()
    return line


def test_without_a_policy_counts_are_exact(tmp_path: Path) -> None:
    TinyFederation(tmp_path, sites=1)
    site = load_site(read_site_config(tmp_path / "sites" / "0.yaml"), tiny_experiment())
    found = Disclosure.of(site, tiny_experiment(), UNRESTRICTED)
    assert (found.train, found.report["validation"]) == (len(site.train.labels), len(site.validation.labels))
    assert found.report["found"] == 16 and "withheld" not in found.report


def test_each_kind_is_kept_back_and_the_run_goes_on_and_says_so(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    with_policy(federation, 0, withhold=["data_report"])
    with_policy(federation, 1, withhold=["training_metrics"])
    with_policy(federation, 2, withhold=["validation_statistics"])
    line = lines_of(tmp_path, federation)
    assert line.left_out == {} and line.failures == {}
    reports = RunFolder(tmp_path / "run").read_summary().sites
    assert {"found", "classes"}.isdisjoint(reports["site-0"].to_json()) and there(reports["site-0"].train) > 0
    assert reports["site-1"].found is not None
    assert there(line.sites["site-0"].train).train_loss is not None and there(line.sites["site-1"].train).train_loss is None
    validated = {name: there(told.validation).n or 0 for name, told in line.sites.items()}
    assert validated["site-2"] == 0 < validated["site-0"]
    assert there(line.validation).n == validated["site-0"] + validated["site-1"]
    privacy = describe_privacy(read_run(tmp_path / "run"))
    assert privacy is not None
    for number in range(3):
        assert any(f"site-{number}" in sentence for sentence in privacy.protected)


def test_noised_counts_are_paid_for_once_and_are_the_same_each_time(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=20)
    path, experiment = with_policy(federation, 0, count_noise=3.0, max_epsilon=None), tiny_experiment()
    first, again = released(path, experiment), released(path, experiment)
    assert first.report == again.report
    assert set(first.report) == {"train", "validation", "classes", "count_noise"}
    entries = [recorded.entry for lineage in open_ledger(read_site_config(path)).lineages() for recorded in lineage.entries]
    assert [(entry.purpose, entry.mechanism.noise_multiplier) for entry in entries] == [("counts", 3.0)]
    assert "steps" not in first.metrics({"steps": 3.0, "train_loss": 1.0})


@pytest.mark.parametrize(("unit", "deviation"), [("image", 4.0), ("patient", 8.0)])
def test_the_noise_has_the_deviation_that_is_accounted(tmp_path: Path, unit: str, deviation: float) -> None:
    """Two images of a patient count at most: to hide a patient takes twice the noise."""
    federation = TinyFederation(tmp_path, sites=1, patients=200)
    path = with_policy(federation, 0, count_noise=4.0, min_unit=unit, images_counted=2)
    config, experiment = read_site_config(path), tiny_experiment()
    site, differences = load_site(config, experiment), []
    for secret in range(120):
        (Path(config.work_dir) / NOISE_KEY_FILE).write_bytes(secret.to_bytes(32, "little"))
        (Path(config.work_dir) / NOISE_KEY_FILE).chmod(0o600)
        told = Disclosure.of(site, experiment, policy_of(config)).report
        differences += [value - exact for value, exact in zip(told["classes"].values(), site.class_counts(2), strict=True)]
    assert np.std(differences) == pytest.approx(deviation, rel=0.25)
    assert abs(np.mean(differences)) < 4 * deviation / len(differences) ** 0.5


def test_no_patient_decides_how_large_the_noise_is_nor_counts_for_more_than_it_hides(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=40)
    path = with_policy(federation, 0, count_noise=1e-6, min_unit="patient", images_counted=2)
    before, manifest = released(path, tiny_experiment()).report, read_manifest(federation.sites / "site-0" / "manifest.csv")
    more = draw_manifest(tmp_path / "more", 8, seed=7)
    ten = tuple(replace(record, patient=manifest.records[0].patient) for record in more.records[:10])
    write_manifest(Manifest((*manifest.records, *ten)), federation.sites / "site-0" / "manifest.csv")
    after = released(path, tiny_experiment()).report
    assert (after["train"], after["validation"], after["classes"]) == (before["train"], before["validation"], before["classes"])


def test_another_key_of_the_noise_is_another_release_and_is_paid_for(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=20)
    path, experiment = with_policy(federation, 0, count_noise=3.0, max_epsilon=None), tiny_experiment()
    config, told = read_site_config(path), []
    for _ in range(2):
        told.append(released(path, experiment).report["classes"])
        (Path(config.work_dir) / NOISE_KEY_FILE).unlink()
    assert told[0] != told[1]
    assert [len(lineage.entries) for lineage in open_ledger(config).lineages()] == [2]


def test_a_budget_that_noised_counts_would_exceed_refuses_the_roll_call(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=20)
    path = with_policy(federation, 0, count_noise=1.0, max_epsilon=0.1)
    with pytest.raises(BudgetError):
        released(path, tiny_experiment())


def test_a_run_with_noised_counts_trains_with_the_numbers_that_it_was_told(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, patients=20)
    with_policy(federation, 1, count_noise=2.0)
    line = lines_of(tmp_path, federation)
    told = RunFolder(tmp_path / "run").read_summary().sites["site-1"]
    assert line.left_out == {} and there(line.sites["site-1"].train).num_examples == told.train
    privacy = describe_privacy(read_run(tmp_path / "run"))
    assert privacy is not None and any("with noise" in sentence and "site-1" in sentence for sentence in privacy.protected)
