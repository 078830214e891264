"""What the report says of a run's protection: what left, what was summed, what was spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pneumofed.server.report.course import PrivacySection, describe_course, describe_privacy
from pneumofed.server.report.read_run import read_run
from pneumofed.server.report.report import write_report
from pneumofed.server.report.results import hospital_rows
from tests.server.report.report_runs import RunMaker
from tests.tiny import TinyFederation, tiny_experiment

PRIVATE = {
    "model": {"norm": "group"},
    "loss": {"logit_adjustment": False},
    "privacy": {"mechanism": "dp_sgd", "target_epsilon": 5.0, "delta": 1e-2, "expected_batch_size": 4},
}
SECRET = {"secure_aggregation": {"enabled": True}}


def told(tmp_path: Path, **changes: Any) -> tuple[PrivacySection, str]:
    federation = TinyFederation(tmp_path, sites=3, patients=12)
    federation.give_identities()
    federation.run("run", tiny_experiment(rounds=1, **changes))
    found = describe_privacy(read_run(tmp_path / "run"))
    assert found is not None
    return found, write_report(tmp_path / "run").read_text()


def test_a_plain_run_says_that_nothing_was_protected_and_names_what_left(tmp_path: Path) -> None:
    found, page = told(tmp_path)
    assert (found.protected, found.spent) == ([], {})
    assert any("weights" in thing and "each hospital" in thing for thing in found.unprotected)
    assert "Nothing was noised or masked" in page


@pytest.mark.usefixtures("drawn")
def test_a_private_run_tells_unit_delta_and_what_each_hospital_spent(tmp_path: Path) -> None:
    found, page = told(tmp_path, **PRIVATE)
    assert "one patient" in found.protected[0] and "delta 0.01" in found.protected[0]
    assert set(found.spent) == {"site-0", "site-1", "site-2"}
    assert all(0 < epsilon <= 5.0 for epsilon in found.spent.values())
    assert not [thing for thing in found.unprotected if "weights" in thing or "loss" in thing]
    assert "site-2" in page


def test_asynchronous_rounds_say_how_old_the_updates_were(tmp_path: Path) -> None:
    maker = RunMaker(tmp_path / "run", strategy={"buffer": 2})
    late = maker.sites[-1]
    maker.rounds(3, staleness={maker.sites[0]: 0, late: 5}).end("succeeded")
    run = read_run(maker.path)
    assert "asynchronous (FedBuff): each took the first 2 good updates" in describe_course(run)
    aged = {row.name: row.staleness for row in hospital_rows(run)}
    assert (aged[maker.sites[0]], aged[late]) == ("0.0 (at most 0)", "5.0 (at most 5)")
    write_report(maker.path)
    page = (maker.path / "report.html").read_text()
    assert "Mean age of updates" in page and f"<small>{late},\n5 old</small>" in page


@pytest.mark.parametrize("changes", [SECRET, {**PRIVATE, **SECRET}])
def test_what_was_summed_is_named_as_a_sum(tmp_path: Path, changes: dict[str, Any]) -> None:
    found, page = told(tmp_path, **changes)
    assert any("under masks" in sentence for sentence in found.protected)
    assert not [thing for thing in found.unprotected if "of each hospital" in thing]
    assert found.spent == {}
    if "privacy" in changes:
        assert "epsilon 5" in page
