"""The policy wins over the run: before any data is read, recorded at the site, and told to the coordinator by the rule's name alone."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.app import app
from pneumofed.client.federation.policy import hash_policy, read_policy
from pneumofed.client.federation.policy_decision import ArrivalFacts, RunRequest, TrainingData, decide
from pneumofed.client.federation.requests import admit, describe_terms, hash_data
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE, read_site_config
from pneumofed.common.audit.log import AuditEntry, AuditLog, read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.errors import PolicyError
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import (
    ModelArrays,
    Presence,
    Update,
    describe_content,
    hash_content,
    pack_arrays,
    pack_update,
    read_failure,
    record_bytes,
    unpack_presence,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import TinyFederation, there, tiny_experiment

NOON = datetime(2026, 3, 2, 12, 0).astimezone()
EXPERIMENT = tiny_experiment()


def policy(**values: Any) -> SitePolicy:
    return build_config(SitePolicy, values)


def refused(rules: SitePolicy, tmp_path: Path, work: Any = "train", now: datetime = NOON, **changes: Any) -> str | None:
    try:
        site = SiteConfig(name="site", manifest="unused", work_dir=str(tmp_path))
        admit(Instruction(tiny_experiment(**changes), "00000000000000a7", 1), site, rules, work, lambda: now)
    except PolicyError as error:
        return error.rule
    return None


def test_the_default_policy_lets_a_usual_run_in(tmp_path: Path) -> None:
    assert refused(policy(), tmp_path) is None


def test_only_the_named_strategies_and_models_may_run(tmp_path: Path) -> None:
    rules = policy(strategies=["fedavg", "fedmedian"], models=["small_cnn"])
    assert refused(rules, tmp_path) is None
    assert refused(rules, tmp_path, strategy={"name": "fedprox"}) == "strategies"
    assert refused(rules, tmp_path, model={"name": "resnet18"}) == "models"
    assert refused(policy(strategies=[]), tmp_path) == "strategies"


@pytest.mark.parametrize("work", ["query", "train", "evaluate"])
def test_a_run_without_privacy_is_refused_where_a_limit_is_set(tmp_path: Path, work: str) -> None:
    assert refused(policy(max_epsilon=8.0), tmp_path, work) == "max_epsilon"


@pytest.mark.parametrize("work", ["query", "train", "evaluate"])
def test_a_run_in_the_clear_is_refused_where_secure_aggregation_is_required(tmp_path: Path, work: str) -> None:
    rules = policy(require_secure_aggregation=True)
    assert refused(rules, tmp_path, work) == "require_secure_aggregation"
    assert refused(rules, tmp_path, work, secure_aggregation={"enabled": True}) is None


def test_too_few_training_patients_are_refused() -> None:
    request = RunRequest.of(EXPERIMENT, "train", "run", 1)
    decide(policy(min_patients=20), request, TrainingData(20)).enforce()
    with pytest.raises(PolicyError) as error:
        decide(policy(min_patients=20), request, TrainingData(19)).enforce()
    assert error.value.rule == "min_patients"


@pytest.mark.parametrize(
    ("hours", "quiet"),
    [("07:30-18:00", [450, 1079]), ("22:00-06:00", [1320, 1439, 0, 359]), ("00:00-00:00", [0, 720, 1439])],
)
def test_quiet_hours_hold_from_their_first_minute_to_the_one_before_their_last(
    tmp_path: Path, hours: str, quiet: list[int]
) -> None:
    rules = policy(quiet_hours=[hours])
    for minute in quiet:
        assert refused(rules, tmp_path, now=NOON.replace(hour=minute // 60, minute=minute % 60)) == "quiet_hours"


@given(start=st.integers(0, 1439), end=st.integers(0, 1439), minute=st.integers(0, 1439))
def test_quiet_hours_may_pass_midnight(start: int, end: int, minute: int) -> None:
    text = "-".join(f"{moment // 60:02d}:{moment % 60:02d}" for moment in (start, end))
    expected = (minute - start) % 1440 < ((end - start) % 1440 or 1440)
    now = NOON.replace(hour=minute // 60, minute=minute % 60)
    decision = decide(policy(quiet_hours=[text]), RunRequest.of(EXPERIMENT, "evaluate", "run", 1), ArrivalFacts(now))
    assert decision.permit == (not expected)


def test_the_roll_call_is_answered_in_quiet_hours(tmp_path: Path) -> None:
    assert refused(policy(quiet_hours=["00:00-00:00"]), tmp_path, "query") is None
    assert refused(policy(quiet_hours=["00:00-00:00"]), tmp_path, "evaluate") == "quiet_hours"


def test_rounds_are_counted_over_24_hours(tmp_path: Path) -> None:
    rules = policy(max_rounds_per_day=2)
    assert refused(rules, tmp_path, now=NOON) is None
    assert refused(rules, tmp_path, now=NOON + timedelta(hours=1)) is None
    assert refused(rules, tmp_path, now=NOON + timedelta(hours=23)) == "max_rounds_per_day"
    assert refused(rules, tmp_path, now=NOON + timedelta(hours=24, minutes=1)) is None
    assert refused(rules, tmp_path, now=NOON + timedelta(hours=24, minutes=2)) == "max_rounds_per_day"


def test_a_clock_that_was_set_back_forgets_no_round(tmp_path: Path) -> None:
    rules = policy(max_rounds_per_day=1)
    assert refused(rules, tmp_path, now=NOON) is None
    assert refused(rules, tmp_path, now=NOON - timedelta(days=40)) == "max_rounds_per_day"


def test_only_training_counts_and_a_refused_run_does_not(tmp_path: Path) -> None:
    rules = policy(max_rounds_per_day=1, strategies=["fedavg"])
    assert refused(rules, tmp_path, "evaluate") is None
    assert refused(rules, tmp_path, strategy={"name": "krum"}) == "strategies"
    assert not (tmp_path / "rounds.json").exists() or json.loads((tmp_path / "rounds.json").read_text()) == []
    assert refused(rules, tmp_path) is None
    assert len(json.loads((tmp_path / "rounds.json").read_text())) == 1


def test_a_count_that_cannot_be_read_refuses(tmp_path: Path) -> None:
    (tmp_path / "rounds.json").write_text("[1,")
    assert refused(policy(), tmp_path) == "max_rounds_per_day"


def _ask_four_times(folder: Path, results: Any) -> None:
    for _ in range(4):
        results.put(refused(policy(max_rounds_per_day=6), folder))


def test_processes_at_once_share_one_count(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_ask_four_times, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in range(12)]
    for process in processes:
        process.join(60)
    assert answers.count(None) == 6


# --- in the app -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path: Path) -> TinyFederation:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return TinyFederation(tmp_path, sites=1, patients=16)


def give_policy(federation: TinyFederation, number: int = 0, **values: Any) -> Path:
    """Writes the site's policy, names it in the site's configuration, and returns the work folder."""
    path = federation.sites / f"{number}.yaml"
    site = yaml.safe_load(path.read_text())
    (federation.folder / f"policy-{number}.yaml").write_text(yaml.safe_dump(values))
    path.write_text(yaml.safe_dump({**site, "policy": f"../policy-{number}.yaml"}))
    return Path(site["work_dir"])


def instruction(**values: Any) -> Instruction:
    model = build_model(EXPERIMENT.model, EXPERIMENT.task, seed=3)
    return Instruction(EXPERIMENT, "00000000000000a7", 3, ModelArrays(*ArraysLayout.of(model).flatten(model)), **values)


def ask(federation: TinyFederation, kind: str, asked: Instruction | None = None) -> Message:
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(federation.sites)})
    return app(Message(pack_instruction(asked or instruction()), dst_node_id=5, message_type=kind), context)


def entries(work: Path) -> list[AuditEntry]:
    return read_entries(work / "audit.jsonl")


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_refusal_comes_before_any_data_is_read(federation: TinyFederation, kind: str) -> None:
    work = give_policy(federation, strategies=["krum"])
    (work / "manifest.csv").unlink()
    failure = read_failure(ask(federation, kind))
    assert (failure.site, failure.error) == ("site-0", "PolicyError")
    assert failure.sentence == "the site's policy refuses this (strategies)"
    assert not (work / "cache").exists()
    assert [entry.event for entry in entries(work)] == ["request", "refusal"]
    assert entries(work)[1].facts["rule"] == "strategies"


def test_a_policy_that_cannot_be_read_refuses_everything(federation: TinyFederation) -> None:
    work = give_policy(federation, strategys=["krum"])
    assert read_failure(ask(federation, "train")).sentence == "the site's policy refuses this (policy)"
    assert entries(work)[-1].facts["rule"] == "policy"


def test_too_few_patients_are_refused_before_training(federation: TinyFederation) -> None:
    give_policy(federation, min_patients=100)
    for kind in ("query", "train", "evaluate"):
        assert read_failure(ask(federation, kind)).sentence == "the site's policy refuses this (min_patients)"


def test_what_left_the_site_is_recorded_before_it_leaves(federation: TinyFederation) -> None:
    work = give_policy(federation)
    head = "c" * 64
    asked = instruction(audit_head=head)
    reply = ask(federation, "train", asked)
    request, answer = entries(work)
    assert asked.arrays is not None
    assert request.facts["run"] == answer.facts["run"] == "00000000000000a7"
    assert request.facts["heads"] == {"coordinator": head}
    assert answer.facts["round"] == 3
    assert answer.facts["bytes"] == record_bytes(pack_arrays(asked.arrays))
    assert answer.facts["arrays"] == ["parameters", "statistics"]
    assert "num-examples" in answer.facts["metrics"]
    assert answer.facts["data"] == hash_data(read_site_config(federation.sites / "0.yaml"))
    assert unpack_presence(reply.content).audit_head == AuditLog(work / "audit.jsonl").head() == answer.hash


def test_the_log_keeps_what_was_asked_and_under_which_policy_and_a_hash_of_all_that_left(federation: TinyFederation) -> None:
    work = give_policy(federation, withhold=["data_report"])
    asked = instruction()
    reply = ask(federation, "train", asked)
    request, answer = entries(work)
    assert (request.facts["study"], request.facts["terms"]) == (asked.experiment.name, describe_terms(asked.experiment))
    assert answer.facts["policy"] == hash_policy(read_policy(federation.folder / "policy-0.yaml")) != hash_policy(SitePolicy())
    presence = unpack_presence(reply.content)
    assert answer.facts["report"] == presence.report
    assert answer.facts["report"]["withheld"] == ["data_report", "validation_statistics"]  # too few patients for the second
    assert answer.facts["values"]["num-examples"] == presence.report["train"] > 0
    del reply.content.config_records["site"]["audit-head"]  # the log's head was added after its last line
    assert answer.facts["sent"] == hash_content(reply.content)
    reply.content.metric_records["metrics"]["train_loss"] = 0.5
    assert answer.facts["sent"] != hash_content(reply.content)


def test_a_metric_that_is_no_number_is_logged_as_none() -> None:
    content = pack_update(Update.of(Presence("north", "0" * 64, {}), instruction().weights, 3, {"train_loss": float("nan")}))
    assert describe_content(content)["values"] == {"num-examples": 3, "train_loss": None}


def test_the_site_records_the_class_of_a_failure_alone(federation: TinyFederation) -> None:
    work = give_policy(federation)
    (work / "manifest.csv").write_text("nonsense")
    assert ask(federation, "train").has_error()
    assert entries(work)[-1].event == "failure"
    assert entries(work)[-1].facts["error"] == "DataError"
    assert str(work) not in (work / "audit.jsonl").read_text()


def test_a_head_that_is_no_hash_does_not_reach_the_log(federation: TinyFederation) -> None:
    work = give_policy(federation)
    ask(federation, "query", instruction(audit_head="DOE^JANE"))
    assert "heads" not in entries(work)[0].facts


def test_the_log_of_a_site_names_no_patient_and_no_file(federation: TinyFederation) -> None:
    work = give_policy(federation)
    for kind in ("query", "train", "evaluate"):
        assert not ask(federation, kind).has_error()
    text = (work / "audit.jsonl").read_text()
    assert "patient-" not in text
    assert ".png" not in text
    assert str(work) not in text
    assert verify_log(work / "audit.jsonl").lines == 6


def test_the_data_hash_follows_the_content_and_the_labels_and_not_the_order(federation: TinyFederation) -> None:
    config = read_site_config(federation.sites / "0.yaml")
    path = Path(config.manifest)
    records = read_manifest(path).records
    first = hash_data(config)
    write_manifest(Manifest(tuple(reversed(records))), path)
    assert hash_data(config) == first
    write_manifest(Manifest(records[1:]), path)
    assert hash_data(config) != first
    write_manifest(Manifest(records), path)
    (Path(config.work_dir) / SPLIT_KEY_FILE).unlink()
    assert hash_data(config) != first  # who has no key of the site cannot try which data it is of


def test_the_data_hash_follows_the_content_of_a_series_of_slices(federation: TinyFederation, tmp_path: Path) -> None:
    config = read_site_config(federation.sites / "0.yaml")
    series, path = tmp_path / "series", Path(config.manifest)
    series.mkdir()
    (series / "1.dcm").write_bytes(b"a slice")
    write_manifest(Manifest((replace(read_manifest(path).records[0], path=series),)), path)
    first = hash_data(config)
    (series / "2.dcm").write_bytes(b"another slice")
    assert hash_data(config) != first


def test_a_site_without_a_policy_keeps_no_audit_log(federation: TinyFederation) -> None:
    assert not ask(federation, "train").has_error()
    assert not (federation.sites / "site-0" / "audit.jsonl").exists()


def test_the_run_goes_on_with_the_sites_that_do_not_refuse(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=3, patients=16)
    give_policy(federation, number=1, models=["resnet18"])
    give_policy(federation, number=2, quiet_hours=["00:00-00:00"])
    summary = federation.run("run", tiny_experiment())
    assert summary.status == "succeeded"
    assert there(summary.absent)["site-1"] == "PolicyError: the site's policy refuses this (models)"
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["failures"]["site-2"] for line in history] == ["PolicyError: the site's policy refuses this (quiet_hours)"] * 2
