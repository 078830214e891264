"""The records of a run: the same JSON as before, with a schema number; old, unknown and damaged content."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.errors import CheckpointError
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import SCHEMA, Metrics, RoundRecord, SiteTraining, SiteValidation, format_record, parse_record
from pneumofed.server.runs.summary_records import BaselineResult, MetricInterval, RunSummary, SiteSummary
from tests.server.report.report_runs import RunMaker
from tests.tiny import there

FORMER = Path(__file__).parent / "former_run"
"""Of runs on phantoms by a version that wrote no schema number: a simulation with baselines, and a round of a secure sum."""


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FORMER / name).read_text().splitlines()]


@pytest.mark.parametrize("name", ["history.jsonl", "secure.jsonl"])
def test_a_history_of_the_former_version_reads_and_is_written_as_it_was(name: str) -> None:
    for content in lines_of(name):
        line = parse_record(RoundRecord, content, name)
        assert json.dumps(line.to_json()) == json.dumps(content)
        assert list(format_record(line).items()) == [("schema", SCHEMA), *line.to_json().items()]


def test_a_summary_of_the_former_version_reads_and_is_written_as_it_was() -> None:
    text = (FORMER / "summary.json").read_text()
    summary = parse_record(RunSummary, json.loads(text), "summary.json")
    assert json.dumps(summary.to_json(), indent=2) + "\n" == text
    assert (summary.status, summary.rounds_completed, summary.phantom) == ("succeeded", 2, True)
    assert summary.auroc("test") == there(summary.test)["auroc"].value
    assert sum(there(site.train) for site in summary.sites.values()) > 0
    assert there(summary.baselines).alone.keys() == summary.sites.keys()


def test_a_former_line_is_typed() -> None:
    line = parse_record(RoundRecord, lines_of("history.jsonl")[1], "history.jsonl")
    assert line.trained == ["hospital-00", "hospital-01", "hospital-02"] == list(line.drawn)
    assert set(line.measured) == {"validation", "test", "external"}
    alone = there(line.sites["hospital-02"].validation)
    assert (alone.n, alone.n_positive, alone.auroc) == (1, 1, None)
    trained = [there(site.train) for site in line.sites.values()]
    total = sum(there(one.num_examples) * there(one.train_loss) for one in trained)
    assert line.mean_train_loss == pytest.approx(total / sum(there(one.num_examples) for one in trained))


def test_a_run_folder_of_the_former_version_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "history.jsonl").write_text((FORMER / "history.jsonl").read_text())
    folder.keep_history_until(1)
    folder.append_history(RoundRecord(round=2))
    first, second = folder.read_history()
    assert first.to_json() == lines_of("history.jsonl")[0]
    assert second.to_json() == {"round": 2}
    assert [json.loads(line)["schema"] for line in folder.history.read_text().splitlines()] == [SCHEMA, SCHEMA]


def test_keys_that_nobody_knows_survive_a_rewrite(tmp_path: Path) -> None:
    folder, site = RunFolder(tmp_path), {"train": {"num_examples": 3, "later": 1}, "later": {"a": [1, 2]}}
    content = {"schema": SCHEMA, "round": 1, "sites": {"north": site}, "later": "x"}
    folder.history.write_text(json.dumps(content) + "\n")
    folder.keep_history_until(1)
    assert json.loads(folder.history.read_text()) == content
    folder.summary.write_text(
        json.dumps({"status": "failed", "error": "x", "later": [None], "sites": {"north": {"used": 3, "b": 1}}})
    )
    folder.write_summary(folder.read_summary().without("error").updated(status="submitted"))
    kept = {"schema": SCHEMA, "status": "submitted", "sites": {"north": {"used": 3, "b": 1}}, "later": [None]}
    assert json.loads(folder.summary.read_text()) == kept


def test_a_newer_schema_is_refused_with_a_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.history.write_text(
        json.dumps({"schema": SCHEMA, "round": 1}) + "\n" + json.dumps({"schema": SCHEMA + 1, "round": 2}) + "\n"
    )
    with pytest.raises(CheckpointError, match=r"line 2 of .*history.jsonl has schema 2, .* reads up to 1: .* a newer version"):
        folder.read_history()
    folder.summary.write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(CheckpointError, match="a newer version"):
        folder.read_summary()


@pytest.mark.parametrize(
    "content", [[], "x", 3, None, {}, {"round": "one"}, {"round": 1, "sites": ["north"]}, {"round": 1, "schema": "1"}]
)
def test_content_that_is_no_round_is_refused(content: object) -> None:
    with pytest.raises(CheckpointError):
        parse_record(RoundRecord, content, "history.jsonl")


def test_a_refusal_names_the_key_and_not_the_value() -> None:
    with pytest.raises(CheckpointError, match=r"damaged: validation\.auroc") as refused:
        parse_record(RoundRecord, {"round": 1, "validation": {"auroc": "DOE JANE"}}, "history.jsonl")
    assert "JANE" not in str(refused.value)


@given(st.floats(), st.integers(0, 1000))
def test_a_number_that_json_does_not_know_is_null(value: float, n: int) -> None:
    line = RoundRecord(round=1, validation=Metrics.model_validate({"n": n, "auroc": value, "auroc_class_0": value}))
    told = json.loads(json.dumps(format_record(line), allow_nan=False))["validation"]
    expected = value if math.isfinite(value) else None
    assert told == {"n": n, "auroc": expected, "auroc_class_0": expected}
    assert there(line.validation).auroc == expected


def test_what_was_not_given_stays_absent_and_none_stays_null() -> None:
    assert RoundRecord(round=1).to_json() == {"round": 1}
    assert MetricInterval(value=0.5, low=None).to_json() == {"value": 0.5, "low": None}
    assert BaselineResult(error="x").to_json() == {"error": "x"}


def test_a_record_never_changes_and_an_update_is_checked() -> None:
    line = RoundRecord(round=1)
    with pytest.raises(ValueError, match="frozen"):
        line.round = 2
    assert (line.updated(round=2).round, line.round) == (2, 1)
    with pytest.raises(ValueError, match="round"):
        line.updated(round="two")


def test_a_site_cannot_break_a_round_or_speak_for_the_coordinator() -> None:
    told = SiteTraining.of(5, {"num_examples": 0.5, "summed": 0.5, "train_loss": math.nan, "own": 2.0})
    assert told.to_json() == {"num_examples": 5, "train_loss": None, "own": 2.0}
    judged = SiteValidation.of({"n": 4, "auroc": 0.5}, {"n": 0.5, "auroc": 1.0, "evaluate_sec": 0.1})
    assert judged.to_json() == {"n": 4, "auroc": 0.5, "evaluate_sec": 0.1}


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (["x"], {}),
        (
            {"used": "many", "classes": {"normal": [1], "pneumonia": 2}, "skipped": 7, "train": 3},
            {"classes": {"pneumonia": 2}, "train": 3},
        ),
        (
            {"withheld": ["data_report"], "count_noise": 2.0, "own": {}},
            {"withheld": ["data_report"], "count_noise": 2.0, "own": {}},
        ),
    ],
)
def test_what_a_site_tells_of_its_data_is_kept_where_it_is_a_count(told: object, kept: dict[str, Any]) -> None:
    summary = RunSummary.model_validate({"sites": {"north": told}})
    assert summary.sites["north"].to_json() == kept
    assert SiteSummary.model_validate(summary.sites["north"]) == summary.sites["north"]


def test_a_fresh_record_is_the_one_that_is_read_back(tmp_path: Path) -> None:
    run = RunMaker(tmp_path).rounds(2).end("succeeded", ("test", "external")).simulated().add_baselines()
    for line in run.folder.read_history():
        assert parse_record(RoundRecord, json.loads(json.dumps(format_record(line))), "history.jsonl") == line
    summary = run.folder.read_summary()
    run.folder.write_summary(summary)
    assert run.folder.read_summary() == summary
