"""Cross-site evaluation: whose model does how well on whose patients, under which rules, and what becomes of those who send nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.alone import train_alone
from pneumofed.client.federation.evaluations import read_evaluations
from pneumofed.client.federation.judging import evaluate_model
from pneumofed.client.federation.network import network_with
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.audit.log import read_entries
from pneumofed.common.errors import ConfigError, MessageError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.wire.instructions import Instruction, pack_instruction, unpack_instruction
from pneumofed.common.wire.messages import ARRAYS, FIRST, OTHER, ModelArrays, pack_arrays, unpack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.after_rounds import first_arrays
from pneumofed.server.federation.cross_site import CrossSite
from pneumofed.server.report.report import write_report
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import CrossSiteMatrix, RunSummary
from tests.adversary.hospital import Hospital
from tests.server.federation.test_run import Killed, assert_same, weights
from tests.tiny import TinyFederation, there, tiny_experiment

BOTH: dict[str, Any] = {"evaluation": {"alone": True, "cross_site": True}}
SLOW: dict[str, Any] = {"rounds": 1, "training": {"learning_rate": 1e-4}, **BOTH}
"""So slow that no AUROC is 1."""
NAMES = ["site-0", "site-1", "site-2"]
OPEN: dict[str, Any] = {"min_patients": 1, "min_validation_patients": 1, "train_alone": True, "share_own_model": True}


class Counting(ClientApp):
    """The real ClientApp; notes who judges another's model and who trains alone, and ends the run at the `deadly`-th such judgement."""

    def __init__(self, deadly: int = 99) -> None:
        super().__init__()
        self.judged: list[str] = []
        self.trained: list[str] = []
        self.deadly = deadly

    def __call__(self, message: Message, context: Context) -> Message:
        site = f"site-{context.node_config['partition-id']}"
        if FIRST in message.content.array_records:
            self.trained.append(site)
        if OTHER in message.content.array_records:
            self.judged.append(site)
            if len(self.judged) == self.deadly:
                raise Killed
        return client_app(message, context)


class Meddling(ClientApp):
    """The real ClientApp; each site in `changes` changes what it answers to messages with the record `kind`."""

    def __init__(self, kind: str, changes: dict[str, Callable[[Message], None]]) -> None:
        super().__init__()
        self.kind, self.changes = kind, changes
        self.asked: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply, site = client_app(message, context), f"site-{context.node_config['partition-id']}"
        if site in self.changes and self.kind in message.content.array_records:
            self.asked.append(site)
            self.changes[site](reply)
        return reply


def set_policy(federation: TinyFederation, number: int, **policy: Any) -> None:
    file = federation.sites / f"{number}.yaml"
    (federation.folder / f"policy-{number}.yaml").write_text(yaml.safe_dump({**OPEN, **policy}))
    site = {**yaml.safe_load(file.read_text()), "policy": f"../policy-{number}.yaml"}
    file.write_text(yaml.safe_dump(site))


def cells_of(summary: RunSummary) -> dict[tuple[str, str], dict[str, Any]]:
    """By owner (empty: the global model) and judge."""
    matrix = there(summary.cross_site)
    rows = {"": matrix.shared, **matrix.own}
    return {(owner, judge): found.to_json() for owner, row in rows.items() for judge, found in row.items()}


def everyone() -> set[tuple[str, str]]:
    return {(owner, judge) for owner in ["", *NAMES] for judge in NAMES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyFederation, RunSummary]:
    federation = TinyFederation(tmp_path_factory.mktemp("finished"))
    return federation, federation.run("run", tiny_experiment(**SLOW))


def test_a_cell_is_the_model_judged_on_that_sites_validation_patients(finished: tuple[TinyFederation, RunSummary]) -> None:
    federation, summary = finished
    experiment, found = tiny_experiment(**SLOW), cells_of(summary)
    assert set(found) == everyone()
    sites = [load_site(read_site_config(federation.sites / f"{number}.yaml"), experiment) for number in range(3)]
    models = {site.name: train_alone(site, experiment, first_arrays(experiment)).arrays for site in sites}
    exact = build_compute("cpu", "fp32", 1)
    for owner, arrays in {"": weights(federation, "run", "best"), **models}.items():
        for site in sites:
            network, _ = network_with(experiment, arrays)
            statistics = evaluate_model(exact.place(network), site, experiment, exact)
            assert (
                found[owner, site.name] == Metrics.model_validate(metrics(statistics, there(summary.threshold).value)).to_json()
            )
    assert len({json.dumps(cell) for cell in found.values()}) == len(found)  # no two cells are the same by chance


def test_the_matrix_is_in_the_summary_the_file_and_the_page_and_no_model_stays(
    finished: tuple[TinyFederation, RunSummary],
) -> None:
    federation, summary = finished
    folder = RunFolder(federation.folder / "run")
    assert folder.read_summary().cross_site == summary.cross_site == folder.read_cross_site()
    assert not folder.own_models.exists()
    page = write_report(folder.path).read_text()
    assert "Every model on every hospital's patients" in page and "own models that of site-" in page
    for (owner, judge), cell in cells_of(summary).items():
        assert f"{f'Model of {owner}' if owner else 'Global model'} on the patients of {judge}: AUROC {cell['auroc']:.3f}" in page
    assert "The own model never left its hospital" not in page
    assert "which the other hospitals got to judge: site-0, site-1, site-2" in page
    assert folder.figure("cross_site").exists()


def test_judging_changes_nothing_of_the_run_and_a_run_without_it_says_nothing(
    finished: tuple[TinyFederation, RunSummary],
) -> None:
    federation, _ = finished
    plain = {**SLOW, "evaluation": {"alone": True}}
    summary = federation.run("without", tiny_experiment(**plain))
    assert_same(weights(federation, "run"), weights(federation, "without"))
    assert summary.cross_site is None and not (federation.folder / "without" / "cross_site.json").exists()
    page = write_report(federation.folder / "without").read_text()
    assert "on every hospital's patients" not in page and "The own model never left its hospital" in page


@pytest.mark.parametrize("deadly", [1, 4])
def test_a_run_killed_while_sites_judge_asks_only_for_the_cells_that_are_missing(
    tmp_path: Path, deadly: int, finished: tuple[TinyFederation, RunSummary]
) -> None:
    federation, dying, counting = TinyFederation(tmp_path), Counting(deadly), Counting()
    with pytest.raises(Killed):
        federation.run("run", tiny_experiment(**SLOW), grid=federation.grid(dying))
    folder = RunFolder(tmp_path / "run")
    known = sum(len(row) for row in there(folder.read_cross_site()).own.values())
    assert (folder.own_models / "site-0.npy").stat().st_mode & 0o777 == 0o600
    summary = federation.run("run", tiny_experiment(**SLOW), resume=True, grid=federation.grid(counting))
    homes = (deadly + 1) // 2  # known from training alone, of the rows that were begun; each other cell was judged
    assert not counting.trained and len(counting.judged) == 6 - (known - homes)
    assert cells_of(summary) == cells_of(finished[1])
    assert not folder.own_models.exists()


def test_a_site_that_did_not_judge_in_its_round_is_asked_about_the_global_model_once(tmp_path: Path) -> None:
    few = {**SLOW, "evaluation": {**BOTH["evaluation"], "fraction_sites": 0.34}}
    federation = TinyFederation(tmp_path)
    for number in range(3):
        set_policy(federation, number, train_alone=number == 0)
    summary = federation.run("run", tiny_experiment(**few))
    matrix = there(summary.cross_site)
    assert set(matrix.shared) == set(NAMES) and set(matrix.own) == {"site-0"}
    assert {site: "train_alone" in reason for site, reason in matrix.not_given.items()} == {"site-1": True, "site-2": True}


def test_what_a_policy_hides_is_in_no_file_page_or_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Site 0 gives no model, site 1 tells no statistics: the row of the one and the column of the other are nowhere."""
    federation = TinyFederation(tmp_path)
    set_policy(federation, 0, share_own_model=False)
    set_policy(federation, 1, withhold=["validation_statistics"])
    set_policy(federation, 2)
    seen = Counting()
    summary = federation.run("run", tiny_experiment(**SLOW), grid=federation.grid(seen), audit_log=tmp_path / "audit.jsonl")
    matrix, folder = there(summary.cross_site), RunFolder(tmp_path / "run")
    assert set(matrix.own) == {"site-2"} and set(matrix.own["site-2"]) == {"site-0", "site-2"}
    assert set(matrix.not_given) == {"site-0", "site-1"} and set(matrix.not_judged) == {"site-1"}
    page = write_report(folder.path).read_text()
    for text in (page, folder.cross_site.read_text(), caplog.text):
        assert "Model of site-0" not in text and "on the patients of site-1" not in text
    assert '"site-1": {' not in folder.cross_site.read_text()
    assert "Hospitals whose own model was not judged" in page and "share_own_model" in page
    assert seen.judged == ["site-0"]  # who may tell nothing of the global model is asked about no other
    left = [entry.facts for entry in read_entries(federation.sites / "site-0" / "audit.jsonl") if entry.event == "answer"]
    assert not any(facts["arrays"] for facts in left if facts["work"] == "evaluate")
    left = [entry.facts for entry in read_entries(federation.sites / "site-2" / "audit.jsonl") if entry.event == "answer"]
    assert [facts["arrays"] for facts in left if facts["work"] == "evaluate" and facts["arrays"]] == [
        ["parameters", "statistics"]
    ]
    patients = {f"patient-{seed}-{number}" for seed in range(3) for number in range(8)}
    assert not [name for name in patients for text in (page, folder.cross_site.read_text(), caplog.text) if name in text]


def test_a_site_whose_policy_refuses_is_asked_about_no_further_model(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    set_policy(federation, 0, train_alone=False, max_evaluations_per_day=1)
    seen = Counting()
    matrix = there(federation.run("run", tiny_experiment(**SLOW), grid=federation.grid(seen)).cross_site)
    assert seen.judged.count("site-0") == 1
    assert "max_evaluations_per_day" in matrix.not_judged["site-0"]
    assert set(matrix.shared) == set(NAMES) and all("site-0" not in row for row in matrix.own.values())


def _spoil(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        record = reply.content.array_records[ARRAYS]
        parameters, statistics = change(record["parameters"].numpy().copy(), record["statistics"].numpy().copy())
        reply.content[ARRAYS] = ArrayRecord({"parameters": Array(parameters), "statistics": Array(statistics)})

    return spoil


def _nan(parameters: np.ndarray, statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parameters[7] = np.nan
    return parameters, statistics


HOSTILE_MODELS: dict[str, Callable[[Message], None]] = {
    "values are not finite": _spoil(_nan),
    "a running variance is negative": _spoil(lambda parameters, statistics: (parameters, statistics - 10)),
    "parameters and": _spoil(lambda parameters, statistics: (parameters[:-1], statistics)),
    r"expected float32 \[N\]": _spoil(lambda parameters, statistics: (parameters.astype(np.float64), statistics)),
    "expected arrays": lambda reply: reply.content.__setitem__(ARRAYS, ArrayRecord({"model": Array(np.zeros(3, np.float32))})),
}


def test_a_model_that_is_none_costs_its_site_the_row_and_nothing_else(tmp_path: Path) -> None:
    federation, hostile = TinyFederation(tmp_path), Meddling(FIRST, {"site-0": HOSTILE_MODELS["values are not finite"]})
    summary = federation.run("run", tiny_experiment(**SLOW), grid=federation.grid(hostile))
    matrix = there(summary.cross_site)
    assert set(matrix.not_given) == {"site-0"} and not matrix.not_judged
    assert set(summary.alone) == set(NAMES) == set(matrix.shared)
    assert {owner: set(row) for owner, row in matrix.own.items()} == {owner: set(NAMES) for owner in ("site-1", "site-2")}


@pytest.mark.parametrize("reason", HOSTILE_MODELS)
def test_each_kind_of_nonsense_is_named_and_no_file_is_written_of_it(tmp_path: Path, reason: str) -> None:
    experiment = tiny_experiment(**SLOW)
    layout = ArraysLayout.of(build_model(experiment.model, experiment.task, seed=0))
    matrix = CrossSite.open(RunFolder(tmp_path), layout, 1)
    reply = Message(RecordDict({ARRAYS: pack_arrays(first_arrays(experiment))}), dst_node_id=5, message_type="evaluate")
    matrix.take_model("north", reply)
    assert set(matrix.found.own) == {"north"} and matrix.read_model("north") is not None
    HOSTILE_MODELS[reason](reply)
    matrix.take_model("south", reply)
    assert set(matrix.found.own) == {"north"} and matrix.read_model("south") is None
    with pytest.raises(MessageError, match=reason):
        raise MessageError(there(RunFolder(tmp_path).read_cross_site()).not_given["south"])


def _set(kind: str, **values: Any) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        records: dict[str, type[Any]] = {"metrics": MetricRecord, "statistics": MetricRecord, "site": ConfigRecord}
        reply.content[kind] = records[kind]({**dict(reply.content[kind]), **values})

    return change


HOSTILE_ANSWERS: dict[str, Callable[[Message], None]] = {
    "the reply names another site": _set("site", name="site-1"),
    "were announced": _set("metrics", **{"num-examples": 5000}),
    "record 'statistics' is missing": lambda reply: reply.content.__delitem__("statistics"),
}


def test_an_answer_that_is_none_costs_its_site_the_column_and_nothing_else(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=4)
    meddling = Meddling(OTHER, {f"site-{number}": change for number, change in enumerate(HOSTILE_ANSWERS.values())})
    matrix = there(federation.run("run", tiny_experiment(**SLOW), grid=federation.grid(meddling)).cross_site)
    for number, reason in enumerate(HOSTILE_ANSWERS):
        assert reason in matrix.not_judged[f"site-{number}"]
    assert set(matrix.not_judged) == {"site-0", "site-1", "site-2"}
    assert sorted(meddling.asked) == ["site-0", "site-1", "site-2"]  # what is no answer is not asked for again
    names = [*NAMES, "site-3"]
    assert {owner: set(row) for owner, row in matrix.own.items()} == {owner: {owner, "site-3"} for owner in names}
    assert set(matrix.shared) == set(names)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluation": {"cross_site": True}}, "set evaluation.alone to true too"),
        ({"secure_aggregation": {"enabled": True}}, "in the clear"),
        (
            {
                "privacy": {"mechanism": "dp_sgd"},
                "model": {"norm": "group"},
                "loss": {"logit_adjustment": False, "class_weights": "none"},
            },
            "is in no ledger",
        ),
        ({"central_privacy": {"enabled": True}, "model": {"norm": "group"}}, "without noise"),
    ],
)
def test_a_run_that_promises_to_hide_what_a_site_trained_cannot_ask_for_its_model(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.cross_site is true but [^\n]*{told}"):
        tiny_experiment(**{**BOTH, **changes})


def _ask_other(hospital: Hospital, **parts: Any) -> Message:
    """The hospital's reply to the request to judge another's model."""
    experiment = tiny_experiment(**{**SLOW, "training": {"validation_fraction": 0.45}})
    model = build_model(experiment.model, experiment.task, seed=9)
    arrays = ModelArrays(*ArraysLayout.of(model).flatten(model))
    content = pack_instruction(Instruction(experiment, "0" * 16, 1, other=arrays, **parts))
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(hospital.federation.sites)})
    return client_app(Message(content, dst_node_id=5, message_type="evaluate"), context)


def test_judging_another_model_is_one_evaluation_and_leaves_no_model_at_the_site(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    work = Path(hospital.config.work_dir)
    reply = _ask_other(hospital)
    answer = unpack_evaluation(reply.content)
    assert answer.num_examples and answer.personal is None and not reply.content.array_records
    assert read_evaluations(work).versions[0].answers == 1
    assert not list(work.rglob("*held-model*"))
    hospital.set_policy(quiet_hours=["00:00-12:00", "12:00-00:00"])
    assert _ask_other(hospital).has_error()
    hospital.set_policy(max_evaluations_per_data=1)
    assert "max_evaluations_per_data" in str(_ask_other(hospital).error.reason)
    hospital.set_policy(min_validation_patients=1000)
    assert unpack_evaluation(_ask_other(hospital).content).num_examples == 0
    assert read_evaluations(work).versions[0].answers == 1


KEPT_BACK: list[dict[str, Any]] = [
    {"share_own_model": False},
    {"withhold": ["validation_statistics"]},
    {"min_validation_patients": 1000},
    {"require_secure_aggregation": True},
    {"max_epsilon": 8.0, "open_statistics": True},
    {"max_epsilon_per_study": 8.0, "open_statistics": True},
    {"min_patients": 1000},
    {"max_evaluations_per_day": 1},
]


def test_the_own_model_leaves_only_where_the_policy_says_so_by_its_own_key(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    experiment = tiny_experiment(**{**SLOW, "training": {"validation_fraction": 0.45}})
    permitted = {"train_alone": True, "share_own_model": True}
    hospital.set_policy(**permitted)
    given = hospital.ask("evaluate", experiment, alone=True).content
    assert set(given.array_records[ARRAYS]) == {"parameters", "statistics"}
    for policy in ({}, {"train_alone": True}, {"share_own_model": True}, *({**permitted, **values} for values in KEPT_BACK)):
        hospital.set_policy(**policy)
        reply = hospital.ask("evaluate", experiment, alone=True)
        assert reply.has_error() or ARRAYS not in reply.content.array_records, policy
    hospital.set_policy(**permitted)
    unasked = tiny_experiment(**{**SLOW, "training": {"validation_fraction": 0.45}, "evaluation": {"alone": True}})
    assert ARRAYS not in hospital.ask("evaluate", unasked, alone=True).content.array_records


def test_another_model_is_asked_about_by_itself_and_only_where_the_run_says_so() -> None:
    arrays = ModelArrays(np.zeros(3, np.float32), np.zeros(0, np.float32))
    asked = pack_instruction(Instruction(tiny_experiment(**BOTH), "0" * 16, 1, other=arrays))
    assert there(unpack_instruction(asked).other).parameters.shape == (3,)
    for record in (ARRAYS, FIRST):
        more = pack_instruction(Instruction(tiny_experiment(**BOTH), "0" * 16, 1, other=arrays))
        more[record] = pack_arrays(arrays)
        with pytest.raises(MessageError, match="by itself"):
            unpack_instruction(more)
    with pytest.raises(MessageError, match=r"does not ask for evaluation\.cross_site"):
        unpack_instruction(pack_instruction(Instruction(tiny_experiment(), "0" * 16, 1, other=arrays)))


def test_a_model_that_was_damaged_in_the_run_folder_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    with pytest.raises(Killed):
        federation.run("run", tiny_experiment(**SLOW), grid=federation.grid(Counting(deadly=1)))
    folder = RunFolder(tmp_path / "run")
    (folder.own_models / "site-1.npy").write_bytes(b"no model")
    summary = federation.run("run", tiny_experiment(**SLOW), resume=True)
    matrix = there(summary.cross_site)
    assert set(matrix.own["site-1"]) == {"site-1"} and "cannot be read" in matrix.not_given["site-1"]
    assert set(matrix.own["site-2"]) == set(NAMES) and summary.status == "succeeded"


def test_cells_of_another_global_model_are_not_taken(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_cross_site(CrossSiteMatrix(round=3, shared={"north": Metrics(n=1)}))
    layout = ArraysLayout.of(build_model(tiny_experiment().model, "binary", seed=0))
    assert CrossSite.open(folder, layout, 3).found.shared and not CrossSite.open(folder, layout, 2).found.shared
