"""Promise: what a message says goes no further than its meaning. Attack: every field of every message, both ways, holds what it likes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pneumofed.client.app import app
from pneumofed.client.federation.network import LocalNorms
from pneumofed.common.audit.log import parse_line, read_entries
from pneumofed.common.errors import MessageError, PneumofedError, PolicyError
from pneumofed.common.evaluation.metrics import ChosenThreshold
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.models.build import build_model
from pneumofed.common.ops.command_line import open_console
from pneumofed.common.secure_aggregation.protocol import Confirmation, SealedShares, Shares, SignedKeys, unpack_reply
from pneumofed.common.wire.instructions import Instruction, pack_instruction, unpack_instruction
from pneumofed.common.wire.messages import (
    SITE_FAILURE_CODE,
    Evaluation,
    ModelArrays,
    Presence,
    Update,
    attach_evaluation,
    attach_head,
    attach_not_judged,
    pack_evaluation,
    pack_update,
    read_failure,
    unpack_attached,
    unpack_evaluation,
    unpack_presence,
    unpack_update,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.replies import EvaluationOutcome, read_personal
from pneumofed.server.federation.rounds import ModelJudgement, _site_trainings
from pneumofed.server.runs.records import RoundRecord
from pneumofed.server.runs.summary_records import RunSummary
from tests.tiny import TinyFederation, there, tiny_experiment

RUN = "00000000000000a7"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EXPERIMENT = tiny_experiment(strategy={"name": "fedbn"})
PATHS = ["../../../../escaped", "/tmp/escaped", "a/../../b", "..", ".", "", "\x00", "C:\\x", "~root", "x" * 5000]
SHOWN = [
    "\x1b]0;owned\x07",
    "\x1b[2J",
    "\u202eexe.gnp",
    "[red]x[/red]",
    "=1+1",
    "a\nb",
    "\x9b31m",
    "<script>",
    "{{7*7}}",
    "\ud800",
]
TEXTS = st.sampled_from(PATHS + SHOWN) | st.text(max_size=40)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
).map(json.dumps)
DEEP = st.just("[" * 20000)
SCALARS = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | TEXTS | JSONS | DEEP | st.binary(max_size=20)
VALUES = SCALARS | st.lists(st.integers(0, 9), max_size=3)
BOMB = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
ARRAYS = st.sampled_from(
    [
        Array(np.zeros(3, np.float32)), Array(np.zeros((2, 2), np.float64)), Array(np.full(5, np.nan, np.float32)),
        Array("float32", (10**12,), "numpy.ndarray", BOMB), Array("float32", (1,), "numpy.ndarray", b"PK\x03\x04"),
        Array("float32", (1,), "pickle", b"cos\nsystem\n"), Array("float32", (1,), "numpy.ndarray", b""),
    ]
)  # fmt: skip


def arrays() -> ModelArrays:
    model = build_model(EXPERIMENT.model, EXPERIMENT.task, seed=3)
    return ModelArrays(*ArraysLayout.of(model).flatten(model))


BASE = arrays()
LAYOUT = ArraysLayout.of(build_model(EXPERIMENT.model, EXPERIMENT.task, seed=3))


def flatten(content: RecordDict) -> list[tuple[str, str]]:
    """(record, key) of every field of the message."""
    return [(name, key) for name, record in content.items() for key in record]


def mutated(content: RecordDict, place: tuple[str, str], value: Any, array: Array, how: str) -> RecordDict:
    """The message with one field replaced, taken out, or with another one beside it; None where Flower cannot carry it."""
    name, key = place
    record = dict(content[name])
    if how == "remove":
        record.pop(key)
    elif how == "remove record":
        return RecordDict({other: kept for other, kept in content.items() if other != name})
    else:
        record[str(value)[:200] if how == "add" else key] = array if isinstance(content[name], ArrayRecord) else value
    return RecordDict({**content, name: type(content[name])(record)})  # type: ignore[arg-type]


@st.composite
def changed(draw: st.DrawFn, content: RecordDict) -> RecordDict:
    place = draw(st.sampled_from(flatten(content)))
    numbers = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.lists(st.floats(), max_size=3)
    value = draw(numbers if isinstance(content[place[0]], MetricRecord) else VALUES)
    how = draw(st.sampled_from(["replace", "replace", "replace", "add", "remove", "remove record"]))
    try:
        return mutated(content, place, value, draw(ARRAYS), how)
    except (TypeError, ValueError):  # no Flower message holds this
        return content


def instruction(**facts: Any) -> RecordDict:
    return pack_instruction(Instruction(EXPERIMENT, RUN, 1, BASE, "0" * 64, **facts))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    made = TinyFederation(tmp_path_factory.mktemp("outer") / "inner", sites=1, patients=16)
    site, policy = made.sites / "0.yaml", made.sites / "site-0" / "policy.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "policy": str(policy)}))
    policy.write_text(yaml.safe_dump({"min_patients": 1, "max_rounds_per_day": 10**6}))
    return made


def files_outside(federation: TinyFederation) -> dict[Path, bytes]:
    inside, outer = federation.sites / "site-0", federation.folder.parent
    return {path: path.read_bytes() for path in outer.rglob("*") if path.is_file() and not path.is_relative_to(inside)}


def ask(federation: TinyFederation, content: RecordDict, kind: str) -> Message:
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(federation.sites)})
    return app(Message(content, dst_node_id=5, message_type=kind), context)


def check_site(federation: TinyFederation, content: RecordDict, kind: str) -> None:
    """Asks the site, and checks what it wrote, said, and put into its log."""
    before, log, details = (
        files_outside(federation),
        *(federation.sites / "site-0" / name for name in ("audit.jsonl", "site.log")),
    )
    read_to = [path.stat().st_size if path.exists() else 0 for path in (log, details)]
    reply = ask(federation, content, kind)
    assert files_outside(federation) == before
    folder = federation.sites / "site-0" / "local_norms"
    assert not folder.exists() or all(re.fullmatch("[0-9a-f]{16}", path.name) for path in folder.iterdir())
    added, told = (
        path.read_bytes()[start:] if path.exists() else b"" for path, start in zip((log, details), read_to, strict=True)
    )
    written = [there(parse_line(line)) for line in added.splitlines(keepends=True)]
    assert written
    if reply.has_error():
        failure = read_failure(reply)
        assert failure.error.endswith("Error") and not CONTROL.search(failure.sentence)
        assert failure.error in {kind.__name__ for kind in subclasses(PneumofedError)}, failure
        assert written[-1].event in ("malformed", "refusal", "failure")
    assert not CONTROL.search(shown("\n".join(f"{entry.facts}" for entry in written)))
    assert not CONTROL.search(told.decode(errors="surrogateescape"))


def subclasses(kind: type[Any]) -> set[type[Any]]:
    return {kind, *(below for child in kind.__subclasses__() for below in subclasses(child))}


def shown(text: str) -> str:
    console = open_console(force_terminal=False, width=200)
    with console.capture() as captured:
        console.print(text)
    return captured.get()


FAST = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))


@given(changed(instruction()), st.sampled_from(["query", "train", "evaluate"]))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_field_of_a_request_leaves_the_sites_folder(federation: TinyFederation, content: RecordDict, kind: str) -> None:
    check_site(federation, content, kind)


@pytest.mark.slow
@given(changed(instruction()) | changed(instruction(step="{}")), st.sampled_from(["query", "train", "evaluate"]))
@LONG
def test_no_field_of_many_requests_leaves_the_sites_folder(federation: TinyFederation, content: RecordDict, kind: str) -> None:
    check_site(federation, content, kind)


@pytest.mark.parametrize("run", [*PATHS, *SHOWN, "A" * 16, RUN + "\n", 7])
def test_a_run_that_is_no_token_names_no_folder_and_leaves_a_line(federation: TinyFederation, run: Any) -> None:
    content = instruction()
    if isinstance(run, int) or run.isprintable() or "\ud800" not in run:
        content["config"] = ConfigRecord({**content.config_records["config"], "run": run})
        check_site(federation, content, "train")
        assert read_entries(federation.sites / "site-0" / "audit.jsonl")[-1].event == "malformed"
    with pytest.raises(MessageError):
        LocalNorms.of(str(federation.folder), run, LAYOUT)


PRESENCE = Presence("site-0", LAYOUT.digest, {"train": 12, "found": 14, "classes": {"normal": 7}, "withheld": ["data_report"]})
UPDATE = pack_update(Update.of(PRESENCE, BASE, 12, {"train_loss": 0.5, "steps": 3.0}))
attach_head(UPDATE, "0" * 64)
NUMBERS = Statistics.zero(2).to_numbers()
EVALUATION = pack_evaluation(Evaluation(PRESENCE, 3, {"evaluate_sec": 1.0}, NUMBERS, NUMBERS))
JUDGED, NOT_JUDGED = (pack_update(Update.of(PRESENCE, BASE, 12, {"train_loss": 0.5})) for _ in range(2))
attach_evaluation(JUDGED, Evaluation(PRESENCE, 3, {"evaluate_sec": 1.0}, NUMBERS, NUMBERS))
attach_not_judged(NOT_JUDGED, PolicyError("quiet_hours", "it is night"))


def check_coordinator(content: RecordDict) -> None:
    """Reads the reply in every way; whatever is taken can be written, shown and read again."""
    texts: list[str] = []
    try:
        update = unpack_update(content, BASE)
        trained = _site_trainings({update.presence.site: update})
        texts.append(str({site: record.to_json() for site, record in trained.items()}))
    except MessageError as error:
        texts.append(str(error))
    try:
        evaluation = unpack_evaluation(content)
        found = Statistics.from_numbers(evaluation.statistics, 2)
        site, own = evaluation.presence.site, read_personal(evaluation, found)
        outcome = EvaluationOutcome(found, {site: (evaluation, found)}, {}, personal={} if own is None else {site: own})
        rounds = (
            ModelJudgement(1, BASE, outcome, ChosenThreshold(0.5, "sensitivity", None, 1.0, 1.0), {})
            .complete(RoundRecord(round=1))
            .sites
        )
        texts.append(str({site: record.to_json() for site, record in rounds.items()}))
    except MessageError as error:
        texts.append(str(error))
    try:
        texts.append(str(unpack_attached(content, "site-0")))
    except MessageError as error:
        texts.append(str(error))
    try:
        presence = unpack_presence(content)
        assert re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", presence.site)
        summary = RunSummary.model_validate({"sites": {presence.site: dict(presence.report)}})
        texts.append(json.dumps(summary.to_json(), allow_nan=False, ensure_ascii=False))
        int(presence.report.get("train", 0))
    except MessageError as error:
        texts.append(str(error))
    for kind in (SignedKeys, SealedShares, Confirmation, Shares):
        with pytest.raises(MessageError):
            unpack_reply(content, kind)  # type: ignore[type-var]
    assert not [text for text in texts if CONTROL.search(text)]


@given(changed(UPDATE) | changed(EVALUATION) | changed(JUDGED) | changed(NOT_JUDGED))
@FAST
def test_no_field_of_a_reply_reaches_the_coordinator_as_it_came(content: RecordDict) -> None:
    check_coordinator(content)


@pytest.mark.slow
@given(changed(UPDATE) | changed(EVALUATION) | changed(JUDGED) | changed(NOT_JUDGED))
@LONG
def test_no_field_of_many_replies_reaches_the_coordinator_as_it_came(content: RecordDict) -> None:
    check_coordinator(content)


@given(JSONS | DEEP | st.fixed_dictionaries({"site": TEXTS, "error": TEXTS, "sentence": TEXTS}).map(json.dumps))
@FAST
def test_a_failure_says_one_printable_sentence_of_bounded_length(reason: str) -> None:
    failure = read_failure(Message(Error(SITE_FAILURE_CODE, reason), reply_to=Message(RecordDict(), 5, "train")))
    assert not CONTROL.search(str(failure)) and "\n" not in str(failure) and len(str(failure)) < 4000
    assert failure.site is None or re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", failure.site)


@given(st.text() | st.sampled_from(SHOWN))
@FAST
def test_what_is_printed_commands_no_terminal(text: str) -> None:
    assert not CONTROL.search(shown(text))


def test_a_sound_instruction_still_passes() -> None:
    assert unpack_instruction(instruction()).run == RUN
