"""The report's matrix: what its sentences claim is what the cells say, and what was not told is shown as such."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.server.report.cross_site import cross_site_sentences, draw_matrix, matrix_table, plot_matrix
from pneumofed.server.report.read_run import StoredRun, read_run
from pneumofed.server.report.report import write_report
from tests.server.report.report_runs import RunMaker
from tests.server.report.test_personal_report import judged

ASKED: dict[str, Any] = {"evaluation": {"alone": True, "cross_site": True}}
Areas = Mapping[str, float | None]


def run_with(path: Path, shared: Areas, own: Mapping[str, Areas], **more: Any) -> StoredRun:
    """AUROC by judge of the global model, and by owner and judge."""
    rows = {owner: {judge: judged(area) for judge, area in row.items()} for owner, row in own.items()}
    matrix = {"round": 2, "shared": {judge: judged(area) for judge, area in shared.items()}, "own": rows, **more}
    RunMaker(path, sites=list(shared) or ["north"], **ASKED).rounds(2).end("succeeded", sets=("test",), cross_site=matrix)
    return read_run(path)


SHARED = {"north": 0.95, "south": 0.90, "east": 0.70}
OWN = {
    "north": {"north": 0.96, "south": 0.86, "east": 0.66},  # 0.04 behind the global model away
    "south": {"north": 0.60, "south": 0.55, "east": 0.69},  # 0.18 behind, and loses at home
    "east": {"north": 0.94, "south": 0.89, "east": 0.60},  # 0.01 behind, though its mean is not the highest beside SHARED
}


def test_who_carries_over_is_judged_beside_the_global_model_on_the_same_patients(tmp_path: Path) -> None:
    (sentence,) = cross_site_sentences(run_with(tmp_path, SHARED, OWN))
    assert "Of 3 hospitals' own models that of east carries over best" in sentence
    assert "mean AUROC 0.915 over 2 hospitals, where the global model has 0.925; that of south carries over least" in sentence
    assert "mean AUROC 0.645 over 2 hospitals, where the global model has 0.825." in sentence


def test_who_loses_at_home_is_named_with_the_model_that_does_better(tmp_path: Path) -> None:
    (sentence,) = cross_site_sentences(run_with(tmp_path, SHARED, OWN))
    assert "At home 2 of 3 own models lose to the best other there: east (0.600) to the global one (0.700), " in sentence
    assert "south (0.550) to the global one (0.900); beyond what chance explains 1." in sentence
    (sentence,) = cross_site_sentences(
        run_with(tmp_path / "b", {"a": 0.5, "b": 0.5}, {"a": {"a": 0.8, "b": 0.9}, "b": {"b": 0.7}})
    )
    assert "At home 1 of 2 own models loses to the best other there: b (0.700) to that of a (0.900)" in sentence
    (sentence,) = cross_site_sentences(run_with(tmp_path / "c", {"a": 0.5}, {"a": {"a": 0.8}}))
    assert sentence == "At home no hospital's own model loses to another one, of 1."


@pytest.mark.usefixtures("drawn")
def test_every_cell_is_in_the_table_with_its_interval_and_in_words(tmp_path: Path) -> None:
    run = run_with(tmp_path, SHARED, OWN)
    table = matrix_table(run)
    assert table is not None and [row.name for row in table.rows] == ["global model", "east", "north", "south"]
    assert [name for name, _ in table.columns] == ["east", "north", "south"]
    page = html.unescape(write_report(tmp_path).read_text())
    body = page[page.index("<h3>Every model on every hospital's patients") :]
    for owner, row in {"global model": SHARED, **OWN}.items():
        whose = "Global model" if owner == "global model" else f"Model of {owner}"
        for judge, area in row.items():
            found = re.search(
                rf'title="{whose} on the patients of {judge}: AUROC {area:.3f} \(95% CI ([^)]*)\)[^"]*40 \+ 60 images', body
            )
            assert found and f"<small>{found.group(1)}</small>" in body
    homes = [cell for row in table.rows for cell in row.cells if cell and cell.home]
    assert [cell.area.value for cell in homes] == [0.60, 0.96, 0.55] and body.count("<strong>0.") == 3


def test_what_was_not_told_or_is_undefined_is_a_dash_and_claims_nothing(tmp_path: Path) -> None:
    run = run_with(
        tmp_path,
        {"north": 0.9, "south": None},
        {"north": {"north": 0.9, "south": None}, "south": {"north": 0.8}},
        not_given={"east": "its model is <b>refused</b>"},
        not_judged={"south": "PolicyError: the site's policy refuses this (max_evaluations_per_day)"},
    )
    table = matrix_table(run)
    assert table is not None and table.rows[2].cells[1] is None and table.rows[1].away == "–"
    (sentence,) = cross_site_sentences(run)
    assert "the model of south has AUROC 0.800, where the global model has 0.900" in sentence and "north (" not in sentence
    page = write_report(tmp_path).read_text()
    assert "undefined (images of one class only)" in page and 'title="not told"' in page
    assert "max_evaluations_per_day" in page and "<b>refused" not in page


@pytest.mark.parametrize(("status", "said"), [("succeeded", 1), ("failed", 0)])
def test_where_no_hospital_gave_a_model_the_page_says_so(tmp_path: Path, status: str, said: int) -> None:
    RunMaker(tmp_path, sites=["north"], **ASKED).rounds(2).end(status, sets=("test",))
    run = read_run(tmp_path)
    sentences = cross_site_sentences(run)
    assert len(sentences) == said and all("none did" in text and "share_own_model" in text for text in sentences)
    assert matrix_table(run) is None and draw_matrix(run) == []


def test_a_run_that_did_not_ask_says_nothing(tmp_path: Path) -> None:
    RunMaker(tmp_path, sites=["north"]).rounds(2).end("succeeded", sets=("test",))
    assert cross_site_sentences(read_run(tmp_path)) == []
    assert "on every hospital's patients" not in write_report(tmp_path).read_text()


def test_the_picture_has_each_cell_at_its_place_and_marks_what_is_missing() -> None:
    values = np.array([[0.9, np.nan], [0.4, 1.0]])
    (ax, _) = plot_matrix(values, ["global model", "a$"], ["a$", "b"], [(0, 1)]).axes
    shown = {(text.get_position(), text.get_text()) for text in ax.texts}
    assert shown == {((0, 0), "0.90"), ((0, 1), "0.40"), ((1, 1), "1.00")}
    assert sorted(patch.get_hatch() or "home" for patch in ax.patches) == ["///", "home"]
    assert np.array_equal(np.asarray(ax.images[0].get_array()), values, equal_nan=True)


def test_of_many_hospitals_the_picture_has_no_numbers() -> None:
    names = [f"site-{number}" for number in range(40)]
    figure = plot_matrix(np.full((40, 40), 0.8), names, names)
    assert not figure.axes[0].texts
