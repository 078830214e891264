"""Runs whose sites train once by themselves: what comes to the coordinator, under which rules, and that it is asked for once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.client.federation import alone
from pneumofed.client.federation.alone import train_alone
from pneumofed.client.federation.evaluations import read_evaluations
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.errors import ConfigError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.models.recipe import plateau_factor
from pneumofed.common.wire.messages import ARRAYS, FIRST, unpack_evaluation
from pneumofed.server.federation.after_rounds import first_arrays
from pneumofed.server.report.report import write_report
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics
from tests.adversary.hospital import Hospital
from tests.server.federation.test_run import Killed, assert_same, weights
from tests.tiny import TinyFederation, there, tiny_experiment

ASKED: dict[str, Any] = {"evaluation": {"alone": True}}
SHARED: dict[str, Any] = {"training": {"validation_fraction": 0.45}, **ASKED}


class Counting(ClientApp):
    """The real ClientApp; notes who is asked to train alone, and ends the run at the `deadly`-th of them."""

    def __init__(self, deadly: int = 99) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.deadly = deadly

    def __call__(self, message: Message, context: Context) -> Message:
        if FIRST in message.content.array_records:
            self.asked.append(int(context.node_config["partition-id"]))
            if len(self.asked) == self.deadly:
                raise Killed
        return client_app(message, context)


def test_both_models_are_judged_on_the_same_patients_and_the_own_one_is_that_of_training_alone(tmp_path: Path) -> None:
    federation, experiment = TinyFederation(tmp_path), tiny_experiment(**ASKED)
    summary = federation.run("run", experiment)
    assert set(summary.alone) == {"site-0", "site-1", "site-2"}
    line = RunFolder(tmp_path / "run").read_history()[summary.best_round - 1]
    for number in range(3):
        site = load_site(read_site_config(federation.sites / f"{number}.yaml"), experiment)
        trained = train_alone(site, experiment, first_arrays(experiment))
        found = summary.alone[site.name]
        oracle = Metrics.model_validate(metrics(trained.statistics, there(summary.threshold).value))
        assert found.personal.to_json() == oracle.to_json()
        assert found.shared.to_json() == there(line.sites[site.name].validation).without("evaluate_sec").to_json()
    assert RunFolder(tmp_path / "run").read_summary().alone == summary.alone
    page = write_report(RunFolder(tmp_path / "run").path).read_text()
    assert "Each hospital alone" in page and "a model trained alone" in page


def test_the_rate_of_training_alone_falls_as_that_of_the_run_where_not_each_round_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plateau = {"schedule": "plateau", "plateau": {"patience_rounds": 1, "min_delta": 10.0}}
    experiment = tiny_experiment(rounds=8, training=plateau, evaluation={"every_rounds": 8, "validate_every_rounds": 2})
    site, factors = load_site(read_site_config(TinyFederation(tmp_path).sites / "0.yaml"), experiment), list[float]()

    def note(setup: Any, examples: Any, plan: Any) -> None:
        factors.append(plan.rate_factor)

    monkeypatch.setattr(alone, "train_locally", note)
    train_alone(site, experiment, first_arrays(experiment))
    judged = [1.0 if experiment.validates(number) else None for number in range(1, 9)]
    assert factors == [plateau_factor(experiment.training, judged[:number]) for number in range(8)] and factors[-1] < 1.0


def test_training_alone_changes_nothing_of_the_run_and_a_run_without_it_says_nothing(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("with", tiny_experiment(**ASKED))
    federation.run("without", tiny_experiment())
    assert_same(weights(federation, "with"), weights(federation, "without"))
    assert not (tmp_path / "without" / "alone.json").exists()
    assert "trained alone" not in write_report(tmp_path / "without").read_text()


def test_a_run_killed_while_sites_train_alone_asks_only_the_rest(tmp_path: Path) -> None:
    federation, experiment = TinyFederation(tmp_path), tiny_experiment(**ASKED)
    dying, counting = Counting(deadly=3), Counting()
    with pytest.raises(Killed):
        federation.run("run", experiment, grid=federation.grid(dying))
    kept = RunFolder(tmp_path / "run").read_alone()
    summary = federation.run("run", experiment, resume=True, grid=federation.grid(counting))
    answered = set(there(kept).sites) if kept else set()
    assert {f"site-{number}" for number in counting.asked} == {"site-0", "site-1", "site-2"} - answered
    assert set(summary.alone) == {"site-0", "site-1", "site-2"}


def test_numbers_of_each_site_and_secure_sums_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.alone"):
        tiny_experiment(**ASKED, secure_aggregation={"enabled": True})


def test_a_hospital_trains_alone_only_where_its_policy_says_so_and_counts_two_evaluations(tmp_path: Path) -> None:
    hospital, experiment = Hospital(tmp_path, 60), tiny_experiment(**SHARED)
    assert "train_alone" in hospital.refusal("evaluate", experiment, alone=True)
    hospital.set_policy(train_alone=True)
    answer = unpack_evaluation(hospital.ask("evaluate", experiment, alone=True).content)
    assert answer.num_examples and there(answer.personal)["classes"] == 2
    assert ARRAYS not in hospital.ask("evaluate", experiment, alone=True).content.array_records
    assert read_evaluations(Path(hospital.config.work_dir)).versions[0].answers == 2 + 2
    assert hospital.refusal("evaluate", tiny_experiment(), alone=True)


@pytest.mark.parametrize(
    "policy", [{"withhold": ["validation_statistics"]}, {"min_validation_patients": 100}, {"max_evaluations_per_day": 1}]
)
def test_where_no_statistics_may_leave_nothing_is_trained(
    tmp_path: Path, policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(alone, "train_alone", refuse)
    hospital = Hospital(tmp_path, 60, train_alone=True, **policy)
    reply = hospital.ask("evaluate", tiny_experiment(**SHARED), alone=True)
    if "max_evaluations_per_day" in policy:
        assert "max_evaluations_per_day" in hospital.refusal("evaluate", tiny_experiment(**SHARED), alone=True)
    else:
        answer = unpack_evaluation(reply.content)
        assert (answer.num_examples, answer.personal) == (0, None)


def test_a_private_run_learns_nothing_of_a_model_that_was_trained_without_noise(tmp_path: Path) -> None:
    private: dict[str, Any] = {
        "privacy": {"mechanism": "dp_sgd", "unit": "patient", "target_epsilon": 5.0},
        "model": {"name": "small_cnn", "norm": "group"},
        "loss": {"logit_adjustment": False, "class_weights": "none"},
    }
    hospital = Hospital(tmp_path, 60, train_alone=True)
    answer = unpack_evaluation(hospital.ask("evaluate", tiny_experiment(**SHARED, **private), alone=True).content)
    assert (answer.num_examples, answer.personal) == (0, None)
