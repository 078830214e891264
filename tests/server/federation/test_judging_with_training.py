"""Rounds whose model is judged with the next round's training: the same numbers one message later, and no training lost for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import ConfigError
from pneumofed.server.federation.round_choices import LearningRate
from pneumofed.server.federation.rounds import Coordinator
from pneumofed.server.federation.run import RunFolder
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.records import Metrics, RoundRecord
from pneumofed.simulation.watch import RunWatch
from tests.server.federation.test_run import PLATEAU, Killed, KillingApp, MeddlingApp, WatchingApp, assert_same, history, weights
from tests.tiny import TinyFederation, there, tiny_experiment


def both(**changes: Any) -> tuple[ExperimentConfig, ExperimentConfig]:
    """An experiment that judges by itself, and one that judges with training."""
    evaluation = changes.pop("evaluation", {})
    return tuple(
        tiny_experiment(**changes, evaluation={**evaluation, "with_training": with_training}) for with_training in (False, True)
    )  # type: ignore[return-value]


def judged(line: RoundRecord) -> dict[str, Any]:
    """What is known of a round but the time that it took."""
    sites = {
        name: site.updated(validation=site.validation and site.validation.without("evaluate_sec"))
        for name, site in line.sites.items()
    }
    plain = line.without("seconds", "bytes").updated(sites={name: site.to_json() for name, site in sites.items()}).to_json()
    for site in plain["sites"].values():
        for name in ("train_sec", "images_per_sec"):
            site["train"].pop(name)
    return plain


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"name": "fedbn"}, "personal": {"method": "ditto"}},
        {"evaluation": {"every_rounds": 9, "validate_every_rounds": 2}, "strategy": {"name": "fedadam"}},
    ],
)
def test_a_round_has_the_numbers_that_it_has_when_it_is_judged_by_itself(tmp_path: Path, changes: dict[str, Any]) -> None:
    federation, watching = TinyFederation(tmp_path), WatchingApp()
    apart, together = both(rounds=5, **changes)
    summaries = [federation.run("apart", apart), federation.run("together", together, grid=federation.grid(watching))]
    assert [judged(line) for line in history(federation, "apart")] == [judged(line) for line in history(federation, "together")]
    for which in ("last", "best"):
        assert_same(weights(federation, "apart", which), weights(federation, "together", which))
    folders = [RunFolder(tmp_path / name) for name in ("apart", "together")]
    kept = [(read_checkpoint(folder.best_checkpoint).round, folder.validation.read_text()) for folder in folders]
    assert kept[0] == kept[1]
    assert summaries[0].best_round == summaries[1].best_round
    assert summaries[0].test == summaries[1].test and summaries[0].threshold == summaries[1].threshold
    assert {number for kind, number in watching.seen if kind == "evaluate"} == {5}  # only the last one needs a message


def test_a_run_killed_before_a_round_was_judged_resumes_as_if_it_never_was(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    _, together = both(rounds=4, training=PLATEAU, early_stopping={"patience_rounds": 3, "min_delta": 0.0})
    federation.run("unbroken", together)
    with pytest.raises(Killed):
        federation.run("broken", together, grid=federation.grid(KillingApp(3)))
    assert [line.judged_later for line in history(federation, "broken")] == [None, True]
    federation.run("broken", together, resume=True)
    lines = [[judged(line) for line in history(federation, name)] for name in ("unbroken", "broken")]
    assert lines[0] == lines[1]
    assert_same(weights(federation, "unbroken"), weights(federation, "broken"))


@pytest.mark.parametrize(
    "step", [pytest.param("replace_last_line", marks=pytest.mark.slow), "write_validation", "append_history"]
)
def test_a_run_killed_between_the_judgement_and_its_round_knows_no_more_than_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    federation = TinyFederation(tmp_path)
    _, together = both(rounds=4, training=PLATEAU)
    federation.run("unbroken", together)
    write, calls = getattr(RunFolder, step), 0

    def die(self: RunFolder, *what: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (3 if step == "append_history" else 2):
            raise Killed
        write(self, *what)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, step, die)
        federation.run("broken", together)
    federation.run("broken", together, resume=True)
    lines = [[judged(line) for line in history(federation, name)] for name in ("unbroken", "broken")]
    assert lines[0] == lines[1]
    best = [read_checkpoint(RunFolder(tmp_path / name).best_checkpoint).round for name in ("unbroken", "broken")]
    assert best[0] == best[1]


def test_what_was_judged_before_a_run_died_is_not_judged_otherwise_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another answer could make a model the best one whose weights are gone."""
    federation, write = TinyFederation(tmp_path), RunFolder.append_history
    _, together = both(rounds=3)

    def die(self: RunFolder, line: RoundRecord) -> None:
        if line.round == 3:
            raise Killed
        write(self, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "append_history", die)
        federation.run("run", together)
    before = history(federation, "run")[1]
    federation.run("run", together, resume=True, grid=federation.grid(MeddlingApp(1, _spoil)))
    assert there(before.validation).n and history(federation, "run")[1] == before


def _spoil(reply: Message) -> Message:
    if "judged" in reply.content:
        reply.content.metric_records["statistics"]["n"] = -1
    return reply


def test_a_run_killed_before_its_last_model_was_judged_has_it_judged_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = TinyFederation(tmp_path)
    _, together = both(rounds=2)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Coordinator, "judge_last", die)
        federation.run("run", together)
    summary = federation.run("run", together, resume=True)
    assert summary.status == "succeeded"
    assert all(line.validation is not None and line.judged_later is None for line in history(federation, "run"))


def test_a_site_that_may_not_judge_again_trains_on_and_is_named(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    path = federation.sites / "1.yaml"
    policy = {"min_validation_patients": 1, "min_patients": 1, "max_evaluations_per_data": 1}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "policy": str(tmp_path / "policy.yaml")}))
    _, together = both(rounds=3, training={"validation_fraction": 0.25})
    federation.run("run", together)
    first, second, third = history(federation, "run")
    assert not first.failures and there(first.sites["site-1"].validation).n
    for line in (second, third):
        assert line.sites["site-1"].train is not None and line.sites["site-1"].validation is None
        assert "max_evaluations_per_data" in line.failures["site-1"]
        assert there(line.validation).n and there(line.sites["site-0"].validation).n
    entries = [entry.facts for entry in read_entries(federation.sites / "site-1" / "audit.jsonl")]
    answers = [entry["metrics"] for entry in entries if entry.get("work") == "train" and "metrics" in entry]
    assert [any(name.startswith("judged ") for name in names) for names in answers] == [False, True, False]
    refused = [(entry["round"], entry["rule"]) for entry in entries if entry.get("work") == "evaluate" and "rule" in entry]
    assert refused == [(2, "max_evaluations_per_data"), (3, "max_evaluations_per_data")]


def test_statistics_that_are_none_cost_the_site_nothing_but_them(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    apart, together = both(rounds=2)
    federation.run("apart", apart)
    federation.run("spoilt", together, grid=federation.grid(MeddlingApp(1, _spoil)))
    assert_same(weights(federation, "apart"), weights(federation, "spoilt"))
    first, second = history(federation, "spoilt")
    assert first.failures["site-1"].startswith("MessageError") and first.sites["site-1"].validation is None
    assert first.sites["site-1"].train is not None and not second.trouble


def test_an_update_without_any_word_of_the_model_counts_and_is_named(tmp_path: Path) -> None:
    class Silent(ClientApp):
        """Of a site that does not know the setting."""

        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            if context.node_config["partition-id"] == 2 and "judged" in reply.content:
                del reply.content["judged"]
            return reply

    federation = TinyFederation(tmp_path)
    _, together = both(rounds=2)
    federation.run("run", together, grid=federation.grid(Silent()))
    first, _ = history(federation, "run")
    assert "'judged' is missing" in first.failures["site-2"] and first.sites["site-2"].train is not None


def test_early_stopping_acts_a_round_later(tmp_path: Path) -> None:
    apart, together = both(rounds=6, early_stopping={"patience_rounds": 1, "min_delta": 0.6})
    federation = TinyFederation(tmp_path)
    assert federation.run("apart", apart).rounds_completed == 2
    assert federation.run("together", together).rounds_completed == 3
    assert all(line.validation is not None for line in history(federation, "together"))


def test_the_rate_falls_a_round_later_on_a_plateau(caplog: pytest.LogCaptureFixture) -> None:
    _, together = both(rounds=5, training=PLATEAU)
    rate = LearningRate(together)
    for number in range(1, 5):
        rate.remember(RoundRecord(round=number, judged_later=True))
        if number > 1:
            rate.complete(RoundRecord(round=number - 1, validation=Metrics(log_loss=0.5)))
    assert [rate.factor(number) for number in range(1, 6)] == [1.0, 1.0, 1.0, 0.5, 0.25]
    assert "no validation" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": {"ema_decay": 0.5}}, "ema_decay"),
        ({"strategy": {"buffer": 2}}, "buffer"),
        ({"evaluation": {"fraction_sites": 0.5}}, "fraction_sites"),
    ],
)
def test_what_no_training_message_brings_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.with_training is on but .*{told}"):
        both(**changes)


def test_a_round_is_said_when_it_was_judged(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    watch = RunWatch(folder, 2, said.append)
    folder.append_history(RoundRecord(round=1, drawn=("a",), judged_later=True))
    watch()
    assert not said
    folder.replace_last_line(RoundRecord(round=1, drawn=("a",), validation=Metrics(auroc=0.5)))
    folder.append_history(RoundRecord(round=2, drawn=("a",), judged_later=True))
    watch()
    assert len(said) == 1 and "validation 0.5000" in said[0]
