"""`pneumofed privacy` at a site: what was spent, what would be, and a ledger that was changed."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pneumofed.client.cli.site import privacy_app as app
from pneumofed.client.federation.policy import policy_of
from pneumofed.client.federation.requests import audit_log
from pneumofed.client.federation.site_data import load_site
from pneumofed.client.privacy.ledger import Spent, check_budget, spend_round
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.audit.log import ANSWER_EVENT
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import merge
from pneumofed.common.errors import BudgetError
from tests.client.complete_site import make_site
from tests.tiny import TINY, tiny_experiment

PRIVATE: dict[str, Any] = {
    "rounds": 3,
    "model": {"norm": "group"},
    "loss": {"logit_adjustment": False},
    "privacy": {"mechanism": "dp_sgd", "target_epsilon": 4.0, "expected_batch_size": 4, "delta": 0.001},
}
EXPERIMENT = tiny_experiment(**PRIVATE)


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    return make_site(tmp_path / "north")


def spend(site: SiteFolder, number: int, run: str = "run-1", experiment: ExperimentConfig = EXPERIMENT) -> Spent:
    loaded = load_site(site.config, experiment)
    patients = len(set(loaded.train.patients))
    return spend_round(run, number, experiment, loaded, SitePlan.of(experiment, patients, patients), policy_of(site.config))


def call(site: SiteFolder, *arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(app, [*arguments, "--site", str(site.path), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def experiment_file(site: SiteFolder) -> str:
    path = site.path / "run.yaml"
    path.write_text(yaml.safe_dump(merge(TINY, PRIVATE)))
    return str(path)


def give_limits(site: SiteFolder, **values: Any) -> None:
    site.policy_file.write_text(yaml.safe_dump({"min_patients_private": 2, **values}))


def test_a_run_spends_its_target_and_the_next_round_is_refused(site: SiteFolder) -> None:
    give_limits(site, max_epsilon=4.0)
    spent = [spend(site, number) for number in (1, 2, 3)]
    assert 3.8 < spent[-1].run == spent[-1].lineage <= 4.0
    with pytest.raises(BudgetError):
        spend(site, 3)
    with pytest.raises(BudgetError):
        check_budget(site.config, policy_of(site.config), EXPERIMENT, "run-1")


def test_show_tells_each_run_and_what_remains(site: SiteFolder) -> None:
    assert call(site, "show") == (0, [])
    give_limits(site, max_epsilon=6.0)
    spend(site, 1)
    spend(site, 1, run="run-2")
    code, (account,) = call(site, "show")
    assert code == 0
    assert [run["run"] for run in account["runs"]] == ["run-1", "run-2"]
    assert account["remaining"] == pytest.approx(6.0 - account["epsilon"])
    assert CliRunner().invoke(app, ["show", "--site", str(site.path)]).exit_code == 0


def test_plan_foretells_what_the_ledger_does(site: SiteFolder, tmp_path: Path) -> None:
    give_limits(site, max_epsilon=4.5)
    spend(site, 1, run="earlier")
    code, found = call(site, "plan", experiment_file(site), "--out", str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    for number in range(1, found["refused_from"] or 4):
        assert spend(site, number).lineage == found["together"][number]
    assert code == (found["refused_from"] is not None)
    if found["refused_from"]:
        with pytest.raises(BudgetError):
            spend(site, found["refused_from"])


def test_plan_counts_nothing(site: SiteFolder) -> None:
    give_limits(site)
    assert call(site, "plan", experiment_file(site))[0] == 0
    assert call(site, "show") == (0, [])


def test_verify_believes_a_sound_ledger_and_no_other(site: SiteFolder) -> None:
    spend(site, 1)
    spend(site, 2)
    assert call(site, "verify")[0] == 0
    with sqlite3.connect(site.work / "ledger.sqlite") as connection:
        connection.execute("UPDATE entry SET body = replace(body, 'run-1', 'run-9') WHERE number = 2")
    code, report = call(site, "verify")
    assert code == 1
    assert "entry 2 was changed" in report["problems"][0]


def test_verify_misses_an_answered_round_that_was_not_counted(site: SiteFolder) -> None:
    log = audit_log(site.config)
    log.record(ANSWER_EVENT, work="train", run="run-1", round=1, metrics=["epsilon", "loss"])
    log.record(ANSWER_EVENT, work="train", run="run-0", round=1, metrics=["loss"])
    code, report = call(site, "verify")
    assert code == 1
    assert report["open_rounds"] == 1
    spend(site, 1)
    assert call(site, "verify")[0] == 0
    log.record(ANSWER_EVENT, work="train", run="run-1", round=1, metrics=["epsilon", "loss"])
    assert call(site, "verify")[0] == 1


def test_validation_images_belong_to_the_data(site: SiteFolder) -> None:
    spend(site, 1)
    spend(site, 1, run="run-2", experiment=EXPERIMENT.model_copy(update={"seed": 5}))
    _, (account,) = call(site, "show")
    assert account["datasets"] == 1
