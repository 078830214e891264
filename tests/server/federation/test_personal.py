"""Runs in which sites train models of their own: what the coordinator keeps, that they resume exactly, and what it refuses to believe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.ditto import PersonalModel, PersonalModels
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.server.federation.test_run import Killed, KillingApp, assert_same, weights
from tests.tiny import TinyFederation, there, tiny_experiment


def ditto(**changes: Any) -> ExperimentConfig:
    return tiny_experiment(**{"rounds": 3, "personal": {"method": "ditto"}, **changes})


def own_models(federation: TinyFederation, name: str) -> dict[str, PersonalModel]:
    run = read_checkpoint(federation.folder / name / "checkpoints" / "last.pt").run
    found = {site.name: PersonalModels.of(site, run).last() for site in sorted(federation.sites.glob("site-*"))}
    return {site: model for site, model in found.items() if model is not None}


def test_history_and_summary_hold_both_models_of_each_site_on_the_same_images(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    summary = federation.run("run", ditto())
    history = RunFolder(tmp_path / "run").read_history()
    for line in history:
        assert len(line.sites) == 3
        for part in line.sites.values():
            own, shared = there(part.personal), there(part.validation)
            assert (own.n, own.n_positive) == (shared.n, shared.n_positive)
    assert RunFolder(tmp_path / "run").read_summary().personal == summary.personal
    assert set(summary.personal) == {"site-0", "site-1", "site-2"}
    for site, both in summary.personal.items():
        assert (both.round, both.shared_round) == (3, summary.best_round)
        assert both.personal == history[2].sites[site].personal
        judged = there(history[summary.best_round - 1].sites[site].validation)
        assert both.shared.to_json() == judged.without("evaluate_sec").to_json()
    assert len({model.arrays.parameters.tobytes() for model in own_models(federation, "run").values()}) == 3


def test_a_run_without_own_models_says_nothing_of_them(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment())
    assert '"personal": {"site' not in (tmp_path / "run" / "summary.json").read_text()
    assert "personal" not in (tmp_path / "run" / "history.jsonl").read_text()
    assert own_models(federation, "run") == {}


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedbn"])
def test_own_models_change_nothing_of_the_global_one(tmp_path: Path, strategy: str) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("with", ditto(strategy={"name": strategy}))
    federation.run("without", tiny_experiment(rounds=3, strategy={"name": strategy}))
    assert_same(weights(federation, "with"), weights(federation, "without"))


@pytest.mark.parametrize("killed_in", [1, 3])
def test_a_run_killed_in_a_round_and_resumed_has_the_own_models_of_one_never_stopped(tmp_path: Path, killed_in: int) -> None:
    experiment = ditto(strategy={"fraction_train": 0.7})
    federation = TinyFederation(tmp_path)
    unbroken = federation.run("unbroken", experiment)
    with pytest.raises(Killed):
        federation.run("broken", experiment, grid=federation.grid(DyingAfterOne(killed_in)))
    resumed = federation.run("broken", experiment, resume=killed_in > 1) if killed_in > 1 else None
    if resumed is None:  # no round was completed: the folder begins again, and so does each site under the new token
        resumed = federation.run("again", experiment)
    name = "broken" if killed_in > 1 else "again"
    first, second = own_models(federation, "unbroken"), own_models(federation, name)
    assert first.keys() == second.keys()
    for site, model in first.items():
        assert_same(model.arrays, second[site].arrays)
    assert {site: both.personal for site, both in unbroken.personal.items()} == {
        site: both.personal for site, both in resumed.personal.items()
    }


class DyingAfterOne(KillingApp):
    """Ends the run in the round after one site has trained, so that this site's model is a round ahead of the run."""

    def __init__(self, round_number: int) -> None:
        super().__init__(round_number)
        self.trained = 0

    def __call__(self, message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        if message.metadata.message_type == "train" and config["round"] == self.round_number:
            self.trained += 1
            if self.trained > 1:
                raise Killed
        return client_app(message, context)


class PersonalMeddler(ClientApp):
    """The real ClientApp, whose first node's statistics of its own model are changed."""

    def __init__(self, change: dict[str, Any]) -> None:
        super().__init__()
        self.change = change

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if context.node_config["partition-id"] == 0 and message.metadata.message_type == "evaluate":
            record = reply.content.metric_records["personal"]
            for key, value in self.change.items():
                record[key] = value
        return reply


@pytest.mark.parametrize("change", [{"index": [], "value": []}, {"classes": 3}, {"value": [1]}])
def test_statistics_of_other_images_or_of_none_are_not_believed(tmp_path: Path, change: dict[str, Any]) -> None:
    federation = TinyFederation(tmp_path)
    summary = federation.run("run", ditto(rounds=1), grid=federation.grid(PersonalMeddler(change)))
    (line,) = RunFolder(tmp_path / "run").read_history()
    assert "MessageError" in line.failures["site-0"]
    assert set(summary.personal) == {"site-1", "site-2"}


def test_what_was_not_asked_for_is_not_kept(tmp_path: Path) -> None:
    class Volunteering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            if message.metadata.message_type == "evaluate":
                reply.content["personal"] = reply.content["statistics"]
            return reply

    federation = TinyFederation(tmp_path, sites=1)
    summary = federation.run("run", tiny_experiment(rounds=1), grid=federation.grid(Volunteering()))
    assert summary.personal == {}
    assert np.isfinite(there(there(summary.validation).log_loss))


def test_a_secure_sum_tells_nothing_of_own_models_and_sites_train_them_all_the_same(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.give_identities()
    secure = {"enabled": True, "stage_timeout_sec": 20.0, "grace_sec": 0.1}
    summary = federation.run("run", ditto(rounds=1, secure_aggregation=secure))
    assert summary.status == "succeeded"
    assert summary.personal == {}
    assert len(own_models(federation, "run")) == 3
