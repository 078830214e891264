"""A message is answered under the policy as it stood when it came: read once, whatever is asked, and not looked at again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.client.app import app
from pneumofed.client.federation import requests
from pneumofed.client.federation.site_data import SiteData, read_site_config
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ModelArrays, read_failure, unpack_evaluation, unpack_presence, unpack_update
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import TinyFederation, tiny_experiment

PLAIN = tiny_experiment()
PRIVATE = tiny_experiment(
    rounds=1,
    model={"norm": "group"},
    loss={"logit_adjustment": False},
    privacy={"mechanism": "dp_sgd", "target_epsilon": 3.0, "expected_batch_size": 4, "delta": 1e-3},
)
LAX: dict[str, Any] = {"min_patients": 1, "min_patients_private": 2, "min_validation_patients": 1, "max_epsilon": None}
STRICT: dict[str, Any] = {
    "min_patients": 1000,
    "max_epsilon": 0.01,
    "withhold": ["data_report", "training_metrics", "validation_statistics"],
    "count_noise": 5.0,
    "max_rounds_per_day": 0,
}

_opened: list[str] = []
"""Every file that this process opens while a test listens."""
_listening: list[bool] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_listen)  # sees every way to open a file, and cannot be taken away again


@pytest.fixture
def opened() -> Iterator[list[str]]:
    _opened.clear()
    _listening.append(True)
    yield _opened
    _listening.clear()


@pytest.fixture
def federation(tmp_path: Path) -> TinyFederation:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return TinyFederation(tmp_path, sites=1, patients=16)


def give_policy(federation: TinyFederation, **values: Any) -> Path:
    """The policy file of site 0, which its configuration now names."""
    path, policy = federation.sites / "0.yaml", federation.folder / "policy.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "policy": str(policy)}))
    policy.write_text(yaml.safe_dump(values))
    return policy


def ask(federation: TinyFederation, kind: str, experiment: ExperimentConfig) -> Message:
    asked = Instruction(experiment, "00000000000000a7", 1, arrays(experiment))
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(federation.sites)})
    return app(Message(pack_instruction(asked), dst_node_id=5, message_type=kind), context)


def arrays(experiment: ExperimentConfig) -> ModelArrays:
    model = build_model(experiment.model, experiment.task, seed=3)
    return ModelArrays(*ArraysLayout.of(model).flatten(model))


def times_read(opened: list[str], policy: Path) -> int:
    return sum(Path(name).name == policy.name for name in opened)


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
@pytest.mark.parametrize("experiment", [PLAIN, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("values", [LAX, {**LAX, "count_noise": 5.0}], ids=["exact", "noised"])
def test_the_policy_is_read_once_for_each_message(
    federation: TinyFederation, opened: list[str], kind: str, experiment: ExperimentConfig, values: dict[str, Any]
) -> None:
    policy = give_policy(federation, **values)
    opened.clear()
    assert not ask(federation, kind, experiment).has_error()
    assert times_read(opened, policy) == 1


def test_a_refused_message_reads_it_once(federation: TinyFederation, opened: list[str]) -> None:
    refusing: list[dict[str, Any]] = [
        {"strategies": []},
        {"min_patients": 1000},
        {"max_rounds_per_day": 0},
        {**LAX, "max_epsilon": 0.1},
    ]
    for values in refusing:
        policy = give_policy(federation, **values)
        opened.clear()
        assert ask(federation, "train", PRIVATE).has_error()
        assert times_read(opened, policy) == 1


def test_each_step_of_a_secure_sum_reads_it_once(tmp_path: Path, opened: list[str]) -> None:
    federation = TinyFederation(tmp_path, patients=16)
    federation.give_identities()
    policy = give_policy(federation, **LAX, require_secure_aggregation=True)
    opened.clear()
    federation.run("run", tiny_experiment(rounds=1, secure_aggregation={"enabled": True, "stage_timeout_sec": 5.0}))
    lines = read_entries(Path(read_site_config(federation.sites / "0.yaml").work_dir) / "audit.jsonl")
    messages = [line.facts.get("secure_sum") for line in lines if line.event == "request"]
    assert {"train mask", "train unmask", "evaluate mask", None} < set(messages)
    assert times_read(opened, policy) == len(messages)


def after_loading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Makes `change` once the site's data is loaded, in the middle of a message."""
    load = requests.load_site

    def load_and_change(*arguments: Any) -> SiteData:
        site = load(*arguments)
        change()
        return site

    monkeypatch.setattr(requests, "load_site", load_and_change)


@pytest.mark.parametrize("edited", [yaml.safe_dump(STRICT), "no policy at all"], ids=["stricter", "broken"])
def test_an_edit_while_a_message_is_answered_is_for_the_next_one(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    policy = give_policy(federation, **LAX)
    after_loading(monkeypatch, lambda: policy.write_text(edited))

    def answered(kind: str) -> RecordDict:
        policy.write_text(yaml.safe_dump(LAX))
        return ask(federation, kind, PRIVATE).content

    assert "found" in unpack_presence(answered("query")).report
    update = unpack_update(answered("train"), arrays(PRIVATE))
    assert {"epsilon", "steps"} <= set(update.metrics)
    assert unpack_evaluation(answered("evaluate")).num_examples > 0
    config = read_site_config(federation.sites / "0.yaml")
    (lineage,) = open_ledger(config).lineages()
    assert [recorded.entry.purpose for recorded in lineage.entries] == ["training"]
    assert ask(federation, "train", PRIVATE).has_error()


def test_a_laxer_policy_in_between_does_not_let_a_message_through(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = give_policy(federation, min_patients=1000)
    after_loading(monkeypatch, lambda: policy.write_text(yaml.safe_dump(LAX)))
    assert read_failure(ask(federation, "train", PRIVATE)).sentence == "the site's policy refuses this (min_patients)"
    assert open_ledger(read_site_config(federation.sites / "0.yaml")).lineages() == []


def test_what_is_withheld_at_the_beginning_stays_withheld(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = give_policy(federation, **LAX, withhold=["training_metrics"])
    after_loading(monkeypatch, lambda: policy.write_text(yaml.safe_dump(LAX)))
    update = unpack_update(ask(federation, "train", PLAIN).content, arrays(PLAIN))
    assert "train_loss" not in update.metrics
