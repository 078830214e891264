"""Runs over real client apps: they resume exactly, name what fails, and end honestly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.held_model import restore_model
from pneumofed.client.federation.site_data import find_site_config
from pneumofed.common.audit.log import hash_arrays, read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.config.choices import CORRECTED, COUNTS_STEPS, StrategyName, UpdatePrecision
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import merge
from pneumofed.common.errors import CheckpointError, RoundError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.model_bundle.pooled_scores import HospitalReference
from pneumofed.common.models.build import build_model, trained_names
from pneumofed.common.wire.instructions import unpack_instruction
from pneumofed.common.wire.messages import ModelArrays, pack_arrays, unpack_arrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.after_rounds import first_arrays
from pneumofed.server.federation.central_evaluation import CentralEvaluator
from pneumofed.server.federation.round_choices import LearningRate
from pneumofed.server.report.report import write_report
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics, RoundRecord
from tests.tiny import TinyFederation, draw_manifest, there, tiny_experiment


class MeddlingApp(ClientApp):
    """The real ClientApp, with something done to the training replies of one node."""

    def __init__(self, node: int, meddle: Callable[[Message], Message], kind: str = "train") -> None:
        super().__init__()
        self.node, self.meddle, self.kind = node, meddle, kind

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        hit = context.node_config["partition-id"] == self.node and message.metadata.message_type == self.kind
        return self.meddle(reply) if hit else reply


class Killed(BaseException):
    """Stands for a process that ends in the middle of a round."""


class KillingApp(ClientApp):
    """Ends the run when a training message of `round_number` arrives."""

    def __init__(self, round_number: int) -> None:
        super().__init__()
        self.round_number = round_number

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and message.content.config_records["config"]["round"] == self.round_number:
            raise Killed
        return client_app(message, context)


class WatchingApp(ClientApp):
    """Keeps the weights that each message brought or referred to, by its type and round."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], ModelArrays] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        site = find_site_config(context.node_config, context.run_config)
        instruction = restore_model(site, unpack_instruction(message.content))
        if instruction.arrays is not None:
            self.seen[message.metadata.message_type, instruction.round] = instruction.arrays
        return client_app(message, context)


def weights(federation: TinyFederation, name: str, which: str = "last") -> ModelArrays:
    return read_checkpoint(federation.folder / name / "checkpoints" / f"{which}.pt").arrays


def history(federation: TinyFederation, name: str) -> list[RoundRecord]:
    return RunFolder(federation.folder / name).read_history()


def assert_same(first: ModelArrays, second: ModelArrays) -> None:
    np.testing.assert_array_equal(first.parameters, second.parameters)
    np.testing.assert_array_equal(first.statistics, second.statistics)


def with_arrays(reply: Message, change: Callable[[np.ndarray], np.ndarray]) -> Message:
    arrays = unpack_arrays(reply.content.array_records["arrays"])
    reply.content["arrays"] = pack_arrays(ModelArrays(change(arrays.parameters), arrays.statistics))
    return reply


def test_the_validation_statistics_of_the_kept_round_stay_for_the_export(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("kept", tiny_experiment())
    folder = RunFolder(federation.folder / "kept")
    kept, round_number = folder.read_validation(2), read_checkpoint(folder.best_checkpoint).round
    line = next(line for line in folder.read_history() if line.round == round_number)
    assert kept is not None and kept[0] == round_number
    assert metrics(kept[1], there(line.threshold).value) == pytest.approx(there(line.validation).to_json(), nan_ok=True)
    folder.validation.write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        folder.read_validation(2)


def test_two_runs_of_one_seed_are_equal_bit_for_bit(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    for name in ("first", "second"):
        federation.run(name, tiny_experiment())
    assert_same(weights(federation, "first"), weights(federation, "second"))


STILL = dict.fromkeys(("rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast", "noise_std"), 0.0)


def frozen_part(experiment: ExperimentConfig) -> tuple[np.ndarray, np.ndarray]:
    network = build_model(experiment.model, experiment.task, 0)
    return ArraysLayout.of(network).untouched(trained_names(network, "head_only"), fix_norms=False)


@pytest.mark.parametrize("changes", [{}, {"strategy": {"ema_decay": 0.7}}, {"strategy": {"name": "fedadam"}}])
def test_what_is_frozen_keeps_its_bits_and_features_are_computed_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    federation = TinyFederation(tmp_path)
    experiment = tiny_experiment(rounds=4, model={"freeze": "head_only"}, augmentation=STILL, **changes)
    federation.run("frozen", experiment)
    first, still = first_arrays(experiment), frozen_part(experiment)
    for which in ("last", "best"):
        kept = weights(federation, "frozen", which)
        assert not np.array_equal(kept.parameters, first.parameters)
        np.testing.assert_array_equal(kept.parameters[still[0]], first.parameters[still[0]])
        np.testing.assert_array_equal(kept.statistics[still[1]], first.statistics[still[1]])
    for site in range(3):  # of the images for training, and of those for validation
        assert len([*(federation.sites / f"site-{site}" / "cache" / "features").glob("*.features")]) == 2


@pytest.mark.parametrize("changes", [{}, {"central_privacy": {"enabled": True, "noise_multiplier": 1.0}}])
def test_neither_a_site_nor_noise_moves_what_is_frozen(tmp_path: Path, changes: dict[str, Any]) -> None:
    federation = TinyFederation(tmp_path)
    experiment = tiny_experiment(rounds=1, model={"freeze": "head_only", "norm": "group"}, **changes)
    still = frozen_part(experiment)[0]
    app = MeddlingApp(1, lambda reply: with_arrays(reply, lambda values: values + np.float32(0.001) * still))
    federation.run("meddled", experiment, grid=federation.grid(app))
    np.testing.assert_array_equal(weights(federation, "meddled").parameters[still], first_arrays(experiment).parameters[still])


def test_the_head_first_rounds_end_and_then_everything_moves(tmp_path: Path) -> None:
    federation, watching = TinyFederation(tmp_path), WatchingApp()
    experiment = tiny_experiment(model={"head_first_rounds": 1})
    federation.run("two", experiment, grid=federation.grid(watching))
    parameters, statistics = frozen_part(experiment)
    first, head, both = first_arrays(experiment), watching.seen["train", 2], weights(federation, "two")
    np.testing.assert_array_equal(head.parameters[parameters], first.parameters[parameters])
    assert (both.parameters[parameters] != first.parameters[parameters]).mean() > 0.5
    assert (both.statistics[statistics] != first.statistics[statistics]).mean() > 0.5


RESUMED = [
    ("fedavg", 0.0),
    ("fedavgm", 0.0),
    ("fedadam", 0.0),
    ("fedyogi", 0.0),
    ("fedbn", 0.0),
    ("fedavg", 0.7),
    ("fedavgm", 0.5),
    ("fednova", 0.0),
    ("scaffold", 0.0),
    ("feddyn", 0.5),
]
QUICK = [RESUMED[0], RESUMED[2], RESUMED[5], RESUMED[-1]]
"""Of these, what is kept of the strategy differs: nothing, moments, an average, corrections."""
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4, "momentum": 0.5}
"""For the strategies that are derived for it."""


@pytest.mark.parametrize(
    ("strategy", "ema_decay"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in RESUMED]
)
def test_a_run_killed_in_a_round_and_resumed_equals_one_never_stopped(
    tmp_path: Path, strategy: StrategyName, ema_decay: float
) -> None:
    training = SGD if strategy in (*COUNTS_STEPS, *CORRECTED) else {}
    drawing = {"name": strategy, "fraction_train": 0.7, "ema_decay": ema_decay}
    experiment = tiny_experiment(rounds=3, strategy=drawing, training=training)
    federation = TinyFederation(tmp_path)
    federation.run("unbroken", experiment)
    for kept in (*federation.sites.glob("site-*/local_norms"), *federation.sites.glob("site-*/corrections")):
        kept.rename(kept.with_name(f"unbroken-{kept.name}"))
    with pytest.raises(Killed):
        federation.run("broken", experiment, grid=federation.grid(KillingApp(3)))
    assert RunFolder(tmp_path / "broken").read_summary().status == "stopped"
    summary = federation.run("broken", experiment, resume=True)
    assert summary.status == "succeeded"
    assert_same(weights(federation, "unbroken"), weights(federation, "broken"))
    drawn, resumed = ([line.drawn for line in history(federation, name)] for name in ("unbroken", "broken"))
    assert drawn == resumed


PLATEAU = {"schedule": "plateau", "plateau": {"patience_rounds": 0, "min_delta": 100.0}, "final_factor": 0.2}
"""Nothing improves by so much: the rate falls after each round but the first, as far as it may."""


@pytest.mark.parametrize(("strategy", "monitor"), [("fedexp", "loss"), ("fedavgm", "auroc")])
def test_on_a_plateau_the_rate_falls_at_the_sites_and_a_resumed_run_goes_on_as_an_unbroken_one(
    tmp_path: Path, strategy: StrategyName, monitor: str
) -> None:
    training = merge(PLATEAU, {"plateau": {"monitor": monitor}})
    experiment = tiny_experiment(rounds=5, strategy={"name": strategy}, training=training)
    federation = TinyFederation(tmp_path)
    federation.run("unbroken", experiment)
    with pytest.raises(Killed):
        federation.run("broken", experiment, grid=federation.grid(KillingApp(4)))
    federation.run("broken", experiment, resume=True)
    for name in ("unbroken", "broken"):
        rounds = history(federation, name)
        factors = [there(line.rate_factor) for line in rounds]
        assert factors == [1.0, 1.0, 0.5, 0.25, 0.2]
        rates = [there(there(line.sites["site-0"].train).learning_rate) for line in rounds]
        assert rates == pytest.approx([factor * experiment.training.learning_rate for factor in factors])
    assert_same(weights(federation, "unbroken"), weights(federation, "broken"))


def test_strategies_take_the_rate_that_a_plateau_came_to() -> None:
    """FedAvgM brings its momentum to it, FedExP its tau."""
    experiment = tiny_experiment(rounds=5, training=PLATEAU, model={"head_first_rounds": 3, "fine_tune_factor": 0.1})
    rate = LearningRate(experiment, [RoundRecord(round=number, validation=Metrics(log_loss=0.5)) for number in (1, 2, 3)])
    assert [rate(number) for number in (1, 2, 3, 4)] == pytest.approx([1.0, 1.0, 0.5, 0.025])


def test_a_round_without_validation_leaves_the_rate_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    rate = LearningRate(tiny_experiment(rounds=5, training=PLATEAU), [RoundRecord(round=1, validation=Metrics(log_loss=0.5))])
    with caplog.at_level("INFO"):
        rate.remember(RoundRecord(round=2, validation=Metrics(n=0)))
        assert rate.factor(3) == 1.0
        rate.remember(RoundRecord(round=3, validation=Metrics(log_loss=0.5)))
    assert rate.factor(4) == 0.5
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "round 2: no validation loss" in said and "round 3" in said and "falls to 0.5" in said


def test_a_round_that_was_not_to_be_validated_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    experiment = tiny_experiment(rounds=9, training=PLATEAU, evaluation=SELDOM)
    rate = LearningRate(experiment)
    for number in range(1, 6):
        rate.remember(RoundRecord(round=number, validation=None if number % 2 else Metrics(log_loss=0.5)))
    assert [rate.factor(number) for number in range(1, 7)] == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert "no validation" not in caplog.text


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment())
    with pytest.raises(CheckpointError, match=r"training\.batch_size was 8, now 4"):
        federation.run("run", tiny_experiment(training={"batch_size": 4}), resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment(rounds=1))
    with pytest.raises(CheckpointError, match="--resume"):
        federation.run("run", tiny_experiment(rounds=1))


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment(rounds=1))
    folder = RunFolder(tmp_path / "run")
    folder.write_summary(folder.read_summary().updated(status="stopped"))
    folder.last_checkpoint.write_bytes(folder.last_checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        federation.run("run", tiny_experiment(rounds=1), resume=True)


def test_a_site_without_images_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=2)
    manifest = draw_manifest(tmp_path / "bad", 2, seed=9)
    for record in manifest.records:
        record.path.write_bytes(b"")
    federation.add_site(2, manifest)
    summary = federation.run("run", tiny_experiment())
    assert summary.status == "succeeded"
    assert "EmptySiteError" in there(summary.absent)["site-2"]
    assert history(federation, "run")[0].drawn == ("site-0", "site-1")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda values: values * np.float32(np.nan), "not finite"),
        (lambda values: values * 1000, "times as long"),
        (lambda values: values[:-1], "expected"),
    ],
)
def test_a_poisoned_reply_is_left_out_named_and_without_effect(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], told: str
) -> None:
    federation = TinyFederation(tmp_path)
    app = MeddlingApp(1, lambda reply: with_arrays(reply, change))
    summary = federation.run("run", tiny_experiment(), grid=federation.grid(app))
    assert summary.status == "succeeded"
    for line in history(federation, "run"):
        assert told in line.left_out["site-1"]
    (federation.sites / "1.yaml").unlink()
    federation.run("without", tiny_experiment())
    assert_same(weights(federation, "run"), weights(federation, "without"))


@pytest.mark.parametrize(("precision", "share"), [("float16", 1 / 2), ("int8", 1 / 4)])
def test_updates_in_fewer_bits_send_fewer_bytes_and_resume_exactly(
    tmp_path: Path, precision: UpdatePrecision, share: float
) -> None:
    federation = TinyFederation(tmp_path)
    full, fewer = tiny_experiment(), tiny_experiment(strategy={"update_precision": precision})
    federation.run("full", full)
    federation.run("fewer", fewer)
    sent = [history(federation, name)[0].bytes.up for name in ("full", "fewer")]
    assert sent[1] == pytest.approx(sent[0] * share, rel=0.1)
    difference = weights(federation, "full").parameters - weights(federation, "fewer").parameters
    assert 0 < np.abs(difference).max() < 0.05
    with pytest.raises(Killed):
        federation.run("broken", fewer, grid=federation.grid(KillingApp(2)))
    federation.run("broken", fewer, resume=True)
    assert_same(weights(federation, "fewer"), weights(federation, "broken"))


def test_too_few_good_replies_fail_the_run_and_say_who_and_why(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    app = MeddlingApp(1, lambda reply: with_arrays(reply, lambda values: values * np.float32(np.nan)))
    with pytest.raises(RoundError):
        federation.run("run", tiny_experiment(strategy={"min_sites": 3}), grid=federation.grid(app))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["rounds_completed"] == 0
    for part in ("round 1", "2 good updates, 3 are needed", "site-1", "not finite"):
        assert part in summary["error"]
    assert "test" not in summary


def test_no_site_at_all_fails_and_says_so(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=0)
    with pytest.raises(RoundError, match="0 sites are ready"):
        federation.run("run", tiny_experiment(strategy={"wait_timeout_sec": 0.1}))


def test_a_run_that_no_longer_improves_stops_early(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    summary = federation.run("run", tiny_experiment(rounds=6, early_stopping={"patience_rounds": 1, "min_delta": 0.6}))
    assert summary.status == "succeeded"
    assert summary.rounds_completed == 2


SELDOM = {"every_rounds": 8, "validate_every_rounds": 2}


@pytest.mark.parametrize("ema_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_rounds_without_validation_train_as_any_and_ask_nobody_to_judge(tmp_path: Path, ema_decay: float) -> None:
    federation, watching = TinyFederation(tmp_path), WatchingApp()
    changes = {"rounds": 5, "strategy": {"ema_decay": ema_decay}}
    federation.run("always", tiny_experiment(**changes, evaluation={"every_rounds": 8}))
    seldom = tiny_experiment(**changes, evaluation=SELDOM)
    with pytest.raises(Killed):
        federation.run("seldom", seldom, grid=federation.grid(KillingApp(4)))
    summary = federation.run("seldom", seldom, grid=federation.grid(watching), resume=True)
    assert_same(weights(federation, "always"), weights(federation, "seldom"))
    lines = {line.round: line for line in history(federation, "seldom")}
    assert [number for number, line in lines.items() if line.validation is not None] == [2, 4, 5]
    assert {number for kind, number in watching.seen if kind == "evaluate"} == {4, 5}
    for line in history(federation, "always"):
        mine = lines[line.round]
        assert (mine.drawn, mine.mean_train_loss) == (line.drawn, line.mean_train_loss)
        if mine.validation is None:
            assert mine.threshold is None and not any(part.validation for part in mine.sites.values())
        else:
            assert (mine.threshold, mine.validation) == (line.threshold, line.validation)
    assert summary.best_round in (2, 4, 5) and summary.threshold == lines[summary.best_round].threshold
    assert "have which score) in 3 of 5 rounds, of each hospital" in write_report(tmp_path / "seldom").read_text()
    assert "have which score) in each round, of each hospital" in write_report(tmp_path / "always").read_text()


def test_early_stopping_counts_the_rounds_that_are_validated(tmp_path: Path) -> None:
    stopping = {"patience_rounds": 1, "min_delta": 0.6}
    summary = TinyFederation(tmp_path).run("run", tiny_experiment(rounds=8, early_stopping=stopping, evaluation=SELDOM))
    assert summary.rounds_completed == 4


def test_whoever_asks_for_central_results_has_the_threshold_that_they_need() -> None:
    often = tiny_experiment(rounds=7, evaluation={"every_rounds": 3, "validate_every_rounds": 2})
    numbers = range(1, 8)
    assert [number for number in numbers if often.judges_centrally(number)] == [3, 6, 7]
    assert [number for number in numbers if often.validates(number)] == [2, 3, 4, 6, 7]
    assert "validate_every_rounds" not in tiny_experiment().model_dump_json()  # an older site reads it as before


def test_a_single_site_federation_is_local_training(tmp_path: Path) -> None:
    from pneumofed.client.federation.site_data import load_site, read_site_config
    from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
    from pneumofed.common.models.build import build_model
    from pneumofed.common.models.compute import build_compute
    from pneumofed.common.seeds import derive_seed
    from pneumofed.common.wire.parameter_layout import ArraysLayout

    experiment = tiny_experiment()
    federation = TinyFederation(tmp_path, sites=1)
    federation.run("run", experiment)
    site = load_site(read_site_config(federation.sites / "0.yaml"), experiment)
    model = build_model(experiment.model, experiment.task, derive_seed(experiment.seed, "initial weights"))
    for number in range(1, experiment.rounds + 1):
        plan = RoundPlan(experiment, number, site.name)
        train_locally(build_setup(model, site.class_counts(2), plan, build_compute("cpu", "fp32", 1)), site.train, plan)
    assert_same(weights(federation, "run"), ModelArrays(*ArraysLayout.of(model).flatten(model)))


def test_the_moving_average_is_judged_and_kept_while_sites_train_on_from_the_rounds_own_weights(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1)
    plain, averaged = WatchingApp(), WatchingApp()
    federation.run("plain", tiny_experiment(rounds=3), grid=federation.grid(plain))
    federation.run("averaged", tiny_experiment(rounds=3, strategy={"ema_decay": 0.75}), grid=federation.grid(averaged))
    expected = plain.seen["evaluate", 1]
    for number in (1, 2, 3):
        assert_same(averaged.seen["train", number], plain.seen["train", number])
        own = plain.seen["evaluate", number]
        pairs = (expected.parameters, own.parameters), (expected.statistics, own.statistics)
        expected = own if number == 1 else ModelArrays(*(np.float32(0.75) * old + np.float32(0.25) * new for old, new in pairs))
        np.testing.assert_allclose(averaged.seen["evaluate", number].parameters, expected.parameters, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(averaged.seen["evaluate", number].statistics, expected.statistics, rtol=1e-5, atol=1e-7)
    assert_same(weights(federation, "averaged"), averaged.seen["evaluate", 3])


@pytest.mark.parametrize("ema_decay", [0.0, 0.6])
def test_the_final_results_are_those_of_the_best_round_whose_predictions_are_not_made_twice(
    tmp_path: Path, ema_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, made = CentralEvaluator.predict, list[dict[str, Predictions]]()

    def counted(evaluator: CentralEvaluator, model: nn.Module) -> dict[str, Predictions]:
        made.append(predict(evaluator, model))
        return made[-1]

    monkeypatch.setattr(CentralEvaluator, "predict", counted)
    federation = TinyFederation(tmp_path)
    summary = federation.run("run", tiny_experiment(rounds=3, strategy={"ema_decay": ema_decay}))
    assert len(made) == 3
    stored = Predictions.read_csv(RunFolder(tmp_path / "run").predictions("test"))
    np.testing.assert_allclose(stored.probabilities, made[summary.best_round - 1]["test"].probabilities, atol=1e-6)
    line = history(federation, "run")[summary.best_round - 1]
    assert summary.auroc("test") == pytest.approx(there(line.test).auroc)
    assert summary.threshold == line.threshold
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt").round == summary.best_round


def test_no_patient_stands_in_the_run_folder(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment())
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and "cache" not in path.parts:
            assert b"patient-" not in path.read_bytes(), path


def test_three_class_task_runs_to_the_end(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=0)
    for number in range(2):
        federation.add_site(number, draw_manifest(tmp_path / f"three-{number}", 9, number, ("normal", "bacterial", "viral")))
    from pneumofed.common.data.manifest import write_manifest

    write_manifest(draw_manifest(tmp_path / "three-test", 9, 77, ("normal", "bacterial", "viral")), tmp_path / "test.csv")
    summary = federation.run("run", tiny_experiment(task="three_class"))
    assert summary.status == "succeeded"
    assert "accuracy_three_class" in summary.central("test")


def test_the_coordinators_audit_log_tells_of_start_rounds_and_end(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    log = tmp_path / "audit.jsonl"
    federation.run("run", tiny_experiment(), audit_log=log)
    entries = read_entries(log)
    assert [entry.event for entry in entries] == ["run-started", "round", "round", "run-ended"]
    assert entries[-2].facts["weights"] == hash_arrays(weights(federation, "run"))
    assert entries[-2].facts["participants"] == ["site-0", "site-1", "site-2"]
    assert verify_log(log).intact


def spoil_scores(reply: Message) -> Message:
    """A site whose counts are none."""
    if "turn" in (statistics := reply.content.metric_records["statistics"]):
        statistics["turn"] = [-1, 1]
    return reply


def test_a_site_that_fails_to_score_is_left_out_and_a_run_killed_while_it_asks_asks_again(tmp_path: Path) -> None:
    experiment = tiny_experiment(evaluation={"hospital_reference": True})
    federation = TinyFederation(tmp_path)
    folder = RunFolder(federation.folder / "run")

    def die(reply: Message) -> Message:
        if "turn" in reply.content.metric_records["statistics"]:
            raise Killed
        return reply

    with pytest.raises(Killed):
        federation.run("run", experiment, grid=federation.grid(MeddlingApp(0, die, "evaluate")))
    assert folder.read_hospital_reference() is None
    federation.run("run", experiment, resume=True, grid=federation.grid(MeddlingApp(0, spoil_scores, "evaluate")))
    kept = folder.read_hospital_reference()
    assert folder.has_succeeded and kept is not None
    assert kept.round == folder.read_summary().best_round
    assert len(kept.sites) == 2
    folder.hospital_reference.write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        folder.read_hospital_reference()


def test_a_run_killed_behind_its_scores_asks_only_the_sites_that_gave_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Message] = []
    experiment = tiny_experiment(evaluation={"hospital_reference": True})
    federation = TinyFederation(tmp_path)
    folder, write = RunFolder(federation.folder / "run"), RunFolder.write_hospital_reference

    def write_and_die(self: RunFolder, reference: HospitalReference) -> None:
        write(self, reference)
        raise Killed

    def count(reply: Message) -> Message:
        if "turn" in reply.content.metric_records["statistics"]:
            asked.append(reply)
        return reply

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RunFolder, "write_hospital_reference", write_and_die)
        federation.run("run", experiment, grid=federation.grid(MeddlingApp(0, spoil_scores, "evaluate")))
    first = there(folder.read_hospital_reference())
    assert len(first.sites) == 2
    federation.run("run", experiment, resume=True, grid=federation.grid(MeddlingApp(1, count, "evaluate")))
    second = there(folder.read_hospital_reference())
    assert len(second.sites) == 3 and not asked
    assert {site: second.sites[site] for site in first.sites} == first.sites


def test_where_no_site_scores_nothing_is_kept_that_would_pass_for_an_answer(tmp_path: Path) -> None:
    experiment = tiny_experiment(evaluation={"hospital_reference": True})
    federation = TinyFederation(tmp_path, sites=1)
    federation.run("run", experiment, grid=federation.grid(MeddlingApp(0, spoil_scores, "evaluate")))
    folder = RunFolder(federation.folder / "run")
    assert folder.has_succeeded and folder.read_hospital_reference() is None
