"""What the hospital's privacy limits refuse from the experiment alone, and how the app answers a round beyond the budget."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.client.app import app
from pneumofed.client.federation.policy import policy_of
from pneumofed.client.federation.policy_decision import ArrivalFacts, RunRequest, decide
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.client.privacy.ledger import spend_round
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ModelArrays, read_failure
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.runs.events import Kind, kind_of_failure
from tests.tiny import TinyFederation, tiny_experiment

GROUP: dict[str, Any] = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}}


def refused(rules: dict[str, Any], **privacy: Any) -> str | None:
    request = RunRequest.of(tiny_experiment(**GROUP, privacy=privacy), "train", "run", 1)
    decision = decide(build_config(SitePolicy, rules), request, ArrivalFacts(datetime(2026, 3, 2, 12)))
    return None if decision.permit else decision.rule


@pytest.mark.parametrize("rule", ["max_epsilon", "max_epsilon_per_study"])
def test_a_limit_lets_in_what_is_private_and_plans_no_more(rule: str) -> None:
    assert refused({rule: 3.0}) == rule
    assert refused({rule: 3.0}, mechanism="dp_sgd", target_epsilon=3.0) is None
    assert refused({rule: 3.0}, mechanism="dp_sgd", target_epsilon=3.1) == rule
    assert refused({rule: 3.0}, mechanism="dp_sgd", target_epsilon=9.0, noise_multiplier=4.0) is None


def test_unit_and_delta_are_the_hospitals_to_demand() -> None:
    assert refused({"min_unit": "patient"}, mechanism="dp_sgd", unit="image") == "min_unit"
    assert refused({"min_unit": "patient"}, mechanism="dp_sgd", unit="patient") is None
    assert refused({"max_delta": 1e-4}, mechanism="dp_sgd", delta=1e-3) == "max_delta"
    assert refused({"max_delta": 1e-4}, mechanism="dp_sgd", delta=1e-4) is None
    assert refused({"min_unit": "patient", "max_delta": 1e-4}) is None


def test_the_coordinator_hears_what_remains_and_the_data_stays_closed(tmp_path: Path) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    federation = TinyFederation(tmp_path, sites=1, patients=32)
    file = federation.sites / "0.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "policy": "policy.yaml"}))
    (federation.sites / "policy.yaml").write_text("max_epsilon: 2.0\n")
    experiment = tiny_experiment(
        rounds=1,
        **GROUP,
        privacy={"mechanism": "dp_sgd", "target_epsilon": 1.9, "expected_batch_size": 4},
    )
    config = read_site_config(file)
    site = load_site(config, experiment)
    patients = len(set(site.train.patients))
    spend_round("00000000000000a7", 1, experiment, site, SitePlan.of(experiment, patients, patients), policy_of(config))
    Path(config.manifest).unlink()

    model = build_model(experiment.model, experiment.task, seed=3)
    asked = Instruction(experiment, "00000000000000a7", 1, ModelArrays(*ArraysLayout.of(model).flatten(model)))
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(federation.sites)})
    failure = read_failure(app(Message(pack_instruction(asked), dst_node_id=5, message_type="train"), context))

    assert failure.error == "BudgetError"
    assert failure.sentence.startswith("the site's policy refuses this (max_epsilon): epsilon 0.1")
    assert kind_of_failure(failure.error) is Kind.REFUSED
    assert [line.event for line in read_entries(Path(config.work_dir) / "audit.jsonl")] == ["request", "refusal"]
