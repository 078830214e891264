"""Promise: `max_epsilon` limits what all runs may reveal of a patient. Attack: the coordinator chooses delta."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.config.parties import DELTA_CEILING, default_delta
from pneumofed.common.privacy.accounting import epsilon
from tests.adversary.hospital import Hospital, private_experiment
from tests.tiny import draw_manifest

README_POLICY = {"max_epsilon": 6, "min_unit": "patient"}


@pytest.mark.parametrize("delta", [0.999, 0.5, 1.0 / 14, 1.1e-3])
def test_a_delta_at_which_every_epsilon_looks_small_is_refused(tmp_path: Path, delta: float) -> None:
    hospital = Hospital(tmp_path, 30, **README_POLICY)
    refused = hospital.refusal("train", private_experiment(delta=delta, noise_multiplier=0.4))
    assert refused == "the site's policy refuses this (max_delta)"
    assert open_ledger(hospital.config).lineages() == []
    assert [line.facts["rule"] for line in hospital.audit if line.event == "refusal"] == ["max_delta"]


def test_what_a_run_may_spend_is_judged_at_the_hospitals_delta(tmp_path: Path) -> None:
    """The README's own policy: whatever delta a run names, epsilon at the hospital's stays within the limit."""
    hospital, spent = Hospital(tmp_path, 30, **README_POLICY), 0
    for number, delta in enumerate((None, 1e-3, 1e-4)):
        spent += not hospital.refusal("train", private_experiment(delta=delta), run=f"run-{number}")
    assert spent > 0
    (lineage,) = open_ledger(hospital.config).lineages()
    mechanisms = [recorded.entry.mechanism for recorded in lineage.entries]
    assert epsilon(mechanisms, default_delta(30), "prv") <= 6.0
    assert all(recorded.delta <= default_delta(30) for recorded in lineage.entries)


def test_of_few_patients_nothing_private_leaves(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 16, **README_POLICY)
    assert hospital.refusal("train", private_experiment()) == "the site's policy refuses this (min_patients_private)"
    assert open_ledger(hospital.config).lineages() == []


@pytest.mark.parametrize("patients", [1, 2, 14, 500, 535, 10_000])
def test_the_default_delta_is_small_against_one_patient(patients: int) -> None:
    assert default_delta(patients) == min(DELTA_CEILING, patients**-1.1)
    assert default_delta(patients) < 1.0 / max(2, patients)


def test_a_run_that_one_site_refuses_says_so(tmp_path: Path) -> None:
    """It goes on with the others, and its summary names the site and the rule."""
    hospital = Hospital(tmp_path, 30, **README_POLICY)
    for number in (1, 2):
        hospital.federation.add_site(number, draw_manifest(tmp_path / f"images-{number}", 12, seed=number))
    summary = hospital.federation.run("run", private_experiment(delta=0.01))
    assert summary.status == "succeeded"
    assert set(summary.sites) == {"site-1", "site-2"}
    assert summary.absent == {"site-0": "PolicyError: the site's policy refuses this (max_delta)"}
