"""The summary says where the model loses: to pooled images, to a hospital alone, and in which group of patients."""

from __future__ import annotations

import math
from pathlib import Path

from pneumofed.server.report.news import gain_table, lead_sentences, population_sentence, subgroup_sentences, subgroup_tables
from pneumofed.server.report.read_run import read_run
from pneumofed.server.report.report import write_report
from pneumofed.server.runs.folder import RunFolder
from tests.server.report.report_runs import RunMaker

LOSES = {"value": -0.03, "low": -0.04, "high": -0.02}
EVEN = {"value": 0.01, "low": -0.01, "high": 0.03}


def _area(value: float) -> dict[str, dict[str, dict[str, float]]]:
    return {"test": {"auroc": {"value": value, "low": value - 0.02, "high": value + 0.02}}}


def _finished(path: Path, alone: dict[str, float]) -> Path:
    maker = RunMaker(path, sites=list(alone)).rounds(2).end("succeeded", sets=("test",))
    table = {
        "pooled": _area(0.99),
        "alone": {site: _area(value) for site, value in alone.items()},
        "lead": {"test": {"best_alone": "north", "over_pooled": LOSES, "over_best_alone": EVEN}},
    }
    maker.folder.write_summary(maker.folder.read_summary().updated(baselines=table))
    return path


def test_the_summary_says_that_pooled_images_do_better(tmp_path: Path) -> None:
    run = read_run(_finished(tmp_path / "run", {"north": 0.999, "south": 0.2}))
    (sentence,) = lead_sentences(run)
    assert sentence.startswith("On the test set: Federated training is worse than training on all images pooled")
    assert "Federated and the best hospital alone (north) cannot be told apart" in sentence
    assert "1 of 2 hospitals has a higher AUROC alone (north)." in sentence
    assert sentence in " ".join(write_report(run.folder.path).read_text("utf-8").replace("&#39;", "'").split())


def test_no_hospital_that_does_better_is_said_too(tmp_path: Path) -> None:
    (sentence,) = lead_sentences(read_run(_finished(tmp_path / "run", {"north": 0.3, "south": 0.2})))
    assert "No hospital has a higher AUROC alone, of 2." in sentence


def test_without_baselines_no_lead_is_claimed(tmp_path: Path) -> None:
    RunMaker(tmp_path / "run").rounds(2).end("succeeded", sets=("test",))
    assert lead_sentences(read_run(tmp_path / "run")) == []


def test_a_group_is_named_only_where_clearly_fewer_are_found(tmp_path: Path) -> None:
    groups = {
        "cause viral": {"n": 100, "n_positive": 100, "tp": 50, "fn": 50, "tn": 0, "fp": 0},
        "cause bacterial": {"n": 100, "n_positive": 100, "tp": 99, "fn": 1, "tn": 0, "fp": 0},
        "sex F": {"n": 40, "n_positive": 20, "tp": 20, "fn": 0, "tn": 20, "fp": 0},
    }
    RunMaker(tmp_path / "run").rounds(2).end("succeeded", sets=("test",), subgroups={"test": groups})
    run = read_run(tmp_path / "run")
    (sentence,) = subgroup_sentences(run)
    assert sentence.startswith(
        "In the test set, of 100 images with pneumonia of the group “cause viral”, 50 are found (95% CI 40–60)"
    )
    assert [row.name for row in subgroup_tables(run)[0].rows] == list(groups)
    assert "group “cause viral”" in write_report(run.folder.path).read_text("utf-8")


def test_each_hospital_is_told_whether_it_gains(tmp_path: Path) -> None:
    path = _finished(tmp_path / "run", {"east": 0.8, "north": 0.9, "south": 0.99})
    folder = RunFolder(path)
    summary = folder.read_summary()
    assert summary.baselines is not None
    gain = {"value": 0.1, "low": 0.05, "high": 0.15}
    lead = summary.baselines.lead["test"].updated(over_alone={"south": LOSES, "east": gain, "north": EVEN})
    folder.write_summary(summary.updated(baselines=summary.baselines.updated(lead={"test": lead})))
    run = read_run(path)
    (sentence,) = lead_sentences(run)
    assert "of 3 hospitals 1 gains, 1 loses (south), and of 1 it cannot be told. Each interval is of one hospital" in sentence
    assert "95% CI of this hospital by itself, which was picked as the best here" in sentence
    folder.write_summary(summary.updated(baselines=summary.baselines.updated(lead={"test": lead.updated(simultaneous=True)})))
    (sentence,) = lead_sentences(read_run(path))
    assert "95% CI of all hospitals at once" in sentence and "by itself" not in sentence
    table = gain_table(run)
    assert table is not None and table.nouns == ["test set"]
    assert [(row.name, row.estimates[0][1].value) for row in table.rows] == [("east", 0.1), ("north", 0.01), ("south", -0.03)]
    assert "What each hospital gains" in write_report(path).read_text("utf-8")


def test_the_worst_population_is_named(tmp_path: Path) -> None:
    RunMaker(tmp_path / "run").rounds(1, sets=("test",)).end(
        "succeeded",
        sets=("test",),
        held_out={"adults": {"auroc": {"value": 0.4}}, "children": {"auroc": {"value": 0.9}}, "one": {"auroc": {"value": None}}},
        test={"auroc": {"value": 0.8}},
    )
    run = read_run(tmp_path / "run")
    assert run.sets == ["test", "adults", "children", "one"]
    assert (
        population_sentence(run)
        == "Over all held-out sets: Federated mean AUROC 0.700 (no interval), lowest 0.400 (no interval) in the adults set."
    )


def test_the_mean_over_populations_has_an_interval_that_is_narrower_than_theirs(tmp_path: Path) -> None:
    area = {"auroc": {"value": 0.8, "low": 0.7, "high": 0.86}}
    other = {"auroc": {"value": 0.6, "low": 0.5, "high": 0.68}}
    RunMaker(tmp_path / "run").rounds(1, sets=("test",)).end("succeeded", sets=("test",), held_out={"adults": other}, test=area)
    low, high = 0.7 - math.hypot(0.1, 0.1) / 2, 0.7 + math.hypot(0.06, 0.08) / 2
    said = population_sentence(read_run(tmp_path / "run"))
    assert f"mean AUROC 0.700 (95% CI {low:.3f}–{high:.3f}), lowest 0.600 (95% CI 0.500–0.680) in the adults set" in said
