"""Coordinator and three hospitals as real processes over TLS: the same weights as the simulation, and books that agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pneumofed.client.site.dossier import build_dossier
from pneumofed.client.site.dossier_page import what_left
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.audit.log import read_entries
from pneumofed.common.audit.verify import anchors_in, verify_log
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.e2e.real import NAMES, RealFederation, three_sources
from tests.tiny import there

pytestmark = [pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """Running, with a Kaggle folder, a DICOM folder and an archive as sources, and one run of two rounds done."""
    folder = tmp_path_factory.mktemp("real")
    with three_sources(folder) as sources:
        federation = RealFederation(folder, sources)
        try:
            federation.start()
            federation.run("first", rounds=2)
            yield federation
        finally:
            federation.stop()


def weights(folder: RunFolder) -> ModelArrays:
    return read_checkpoint(folder.last_checkpoint).arrays


def test_three_sources_over_tls_give_the_weights_of_the_simulation_bit_for_bit(
    federation: RealFederation, tmp_path: Path
) -> None:
    history = federation.run_folder("first").read_history()
    assert [list(line.drawn) for line in history] == [sorted(NAMES)] * 2
    assert all(not line.failures and not line.left_out for line in history)
    real, simulated = weights(federation.run_folder("first")), weights(federation.simulate("first", tmp_path))
    np.testing.assert_array_equal(real.parameters, simulated.parameters)
    np.testing.assert_array_equal(real.statistics, simulated.statistics)


def test_the_run_has_the_report_that_its_app_did_not_write(federation: RealFederation) -> None:
    federation.state("first")
    assert 'class="badge succeeded"' in federation.run_folder("first").report.read_text()


def test_the_audit_logs_of_both_sides_hold_and_anchor_each_other(federation: RealFederation) -> None:
    coordinator = federation.coordinator / "state" / "audit.jsonl"
    assert verify_log(coordinator).intact
    events = [entry.event for entry in read_entries(coordinator)]
    assert events[:4] == ["run-started", "round", "round", "run-ended"]
    for name in NAMES:
        log = federation.site(name) / "work" / "audit.jsonl"
        known = anchors_in(coordinator, name)
        assert known and verify_log(log, known).intact
        left = [entry.facts for entry in read_entries(log) if entry.event == "answer" and entry.facts["work"] == "train"]
        assert [facts["arrays"] for facts in left] == [["parameters", "statistics"]] * 2


def test_nothing_of_a_patient_is_outside_the_sites_folder(federation: RealFederation) -> None:
    for name in NAMES:
        site = federation.site(name)
        patients = {line.split(",")[1].encode() for line in (site / "data" / "manifest.csv").read_text().splitlines()[1:]}
        for path in (path for path in federation.coordinator.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert b"DOE^JANE" not in content, path
            assert not [patient for patient in patients if patient in content], path


@pytest.mark.slow
def test_a_second_run_of_the_same_name_is_refused_and_the_first_stays(federation: RealFederation) -> None:
    with pytest.raises(AssertionError, match="exited with 2"):
        federation.submit("first")
    assert federation.state("first")["state"] == "succeeded"


@pytest.mark.slow
def test_the_hospitals_that_allow_it_train_once_by_themselves(federation: RealFederation) -> None:
    willing = {"north", "hill"}
    for name in willing:
        federation.change_yaml(federation.site(name) / "policy.yaml", train_alone=True)
    federation.change_yaml(federation.site("north") / "policy.yaml", share_own_model=True)
    summary = federation.run("alone", rounds=1, evaluation={"alone": True, "cross_site": True})
    assert set(summary.alone) == willing
    matrix = there(summary.cross_site)
    assert {owner: set(row) for owner, row in matrix.own.items()} == {"north": set(NAMES)} and set(matrix.shared) == set(NAMES)
    assert set(matrix.not_given) == {"hill", "river"} and not matrix.not_judged
    assert not federation.run_folder("alone").own_models.exists()
    refused = [entry for entry in read_entries(federation.site("river") / "work" / "audit.jsonl") if entry.event == "refusal"]
    assert [entry.facts["rule"] for entry in refused] == ["train_alone"]
    federation.state("alone")
    page = federation.run_folder("alone").report.read_text()
    assert "Each hospital alone" in page and "Every model on every hospital's patients" in page
    asked = {name: read_entries(federation.site(name) / "work" / "audit.jsonl")[-1].facts["run"] for name in NAMES}
    given = {name: what_left(build_dossier(SiteFolder(federation.site(name)), run)) for name, run in asked.items()}
    owners = {name for name, things in given.items() if any("other hospitals got to judge" in thing.title for thing in things)}
    assert owners == {"north"}
