"""What a hospital answers, and what it never says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.client.app import app, train_round
from pneumofed.client.federation.judging import evaluate_round
from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.site_data import find_site_config, load_site, read_site_config
from pneumofed.common.errors import ConfigError, MessageError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ModelArrays, read_failure, unpack_evaluation, unpack_update
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import TinyFederation, draw_manifest, tiny_experiment

EXPERIMENT = tiny_experiment()


@pytest.fixture
def federation(tmp_path: Path) -> TinyFederation:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return TinyFederation(tmp_path, sites=1)


def instruction(round_number: int = 1) -> Instruction:
    model = build_model(EXPERIMENT.model, EXPERIMENT.task, seed=3)
    return Instruction(EXPERIMENT, "00000000000000a7", round_number, ModelArrays(*ArraysLayout.of(model).flatten(model)))


def ask(federation: TinyFederation, kind: str, content: RecordDict) -> Message:
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(federation.sites)})
    return app(Message(content, dst_node_id=5, message_type=kind), context)


def everything_in(message: Message) -> str:
    parts = [str(message.error)] if message.has_error() else []
    if message.has_content():
        for records in (message.content.config_records, message.content.metric_records):
            parts += [json.dumps({key: str(value) for key, value in record.items()}) for record in records.values()]
    return " ".join(parts)


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_no_reply_names_a_patient_a_file_or_a_folder(tmp_path: Path, kind: str) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    federation = TinyFederation(tmp_path / "DOE^JANE", sites=1)
    (tmp_path / "DOE^JANE" / "images-0" / "0-0.png").write_bytes(b"broken")
    reply = ask(federation, kind, pack_instruction(instruction()))
    assert not reply.has_error()
    said = everything_in(reply)
    assert "DOE" not in said
    assert "patient-" not in said
    assert str(tmp_path) not in said
    assert '"skipped"' in said.replace("\\", "")


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_site_without_usable_images_says_who_it_is_and_why_and_no_more(tmp_path: Path, kind: str) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    federation = TinyFederation(tmp_path / "DOE^JANE", sites=0)
    manifest = draw_manifest(tmp_path / "DOE^JANE" / "images", 2, seed=0)
    for record in manifest.records:
        record.path.write_bytes(b"")
    federation.add_site(0, manifest)
    reply = ask(federation, kind, pack_instruction(instruction()))
    failure = read_failure(reply)
    assert (failure.site, failure.error) == ("site-0", "EmptySiteError")
    assert "DOE" not in everything_in(reply)
    assert "EmptySiteError" in (federation.sites / "site-0" / "site.log").read_text()


def first_arrays() -> ModelArrays:
    arrays = instruction().arrays
    assert arrays is not None
    return arrays


def test_a_training_answer_is_the_local_loop_on_the_training_patients(federation: TinyFederation) -> None:
    config = read_site_config(federation.sites / "0.yaml")
    update = unpack_update(train_round(instruction(), config, UNRESTRICTED), first_arrays())
    assert update.num_examples == len(load_site(config, EXPERIMENT).train)
    assert not np.array_equal(update.arrays.parameters, instruction().arrays.parameters)  # type: ignore[union-attr]
    again = unpack_update(train_round(instruction(), config, UNRESTRICTED), first_arrays())
    np.testing.assert_array_equal(update.arrays.parameters, again.arrays.parameters)


def test_an_evaluation_answer_holds_the_validation_patients_alone(federation: TinyFederation) -> None:
    config = read_site_config(federation.sites / "0.yaml")
    evaluation = unpack_evaluation(evaluate_round(instruction(), config, UNRESTRICTED))
    statistics = Statistics.from_numbers(evaluation.statistics, classes=2)
    validation = load_site(config, EXPERIMENT).validation
    assert statistics.n == len(validation)
    assert metrics(statistics, 0.5)["n_positive"] == int(validation.labels.sum())


def test_training_and_validation_share_no_patient(federation: TinyFederation) -> None:
    site = load_site(read_site_config(federation.sites / "0.yaml"), EXPERIMENT)
    assert set(site.train.patients).isdisjoint(site.validation.patients)
    assert len(site.validation) > 0


def test_the_hospitals_own_node_config_wins_over_the_run(federation: TinyFederation, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nmanifest: m.csv\nwork_dir: work\n")
    config = find_site_config({"site-config": str(own), "partition-id": 0}, {"sites": str(federation.sites)})
    assert config.name == "own"
    assert Path(config.manifest) == tmp_path / "m.csv"


def test_a_node_that_knows_no_site_says_how_to_start_one() -> None:
    with pytest.raises(ConfigError, match="--node-config"):
        find_site_config({}, {"sites": "/somewhere"})


def test_an_instruction_without_weights_is_refused(federation: TinyFederation) -> None:
    with pytest.raises(MessageError):
        train_round(Instruction(EXPERIMENT, "00000000000000a7", 1), read_site_config(federation.sites / "0.yaml"), UNRESTRICTED)
