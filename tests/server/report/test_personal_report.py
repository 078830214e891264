"""The report says who does better with its own model, with the counts behind, and claims nothing where nothing was judged."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from pneumofed.server.report.personal import personal_sentences, personal_table
from pneumofed.server.report.read_run import StoredRun, read_run
from pneumofed.server.report.report import write_report
from tests.server.report.report_runs import RunMaker

DITTO = {"personal": {"method": "ditto"}}


def judged(area: float | None, normal: int = 40, pneumonia: int = 60) -> dict[str, Any]:
    return {
        "n": normal + pneumonia,
        "n_positive": pneumonia,
        "tn": normal,
        "fp": 0,
        "fn": 0,
        "tp": pneumonia,
        "auroc": area,
        "log_loss": 0.4,
    }


def run_with(path: Path, areas: Mapping[str, tuple[float | None, float | None]], rounds: int = 1, **changes: Any) -> StoredRun:
    """Each hospital's areas under the global and under its own model."""
    sites = {name: {"validation": judged(shared), "personal": judged(own)} for name, (shared, own) in areas.items()}
    RunMaker(path, sites=list(areas), **{**DITTO, **changes}).rounds(rounds, sites=sites).end("succeeded", sets=("test",))
    return read_run(path)


AREAS = {"north": (0.80, 0.97), "south": (0.90, 0.91), "east": (0.95, 0.60), "west": (0.90, 0.90)}


def test_the_sentence_counts_who_does_better_and_of_whom_it_is_clear(tmp_path: Path) -> None:
    (sentence,) = personal_sentences(run_with(tmp_path, AREAS))
    assert "2 of 4 hospitals do better with their own model (north, south), 1 worse (east)" in sentence
    assert "beyond what chance explains 1 does better and 1 worse" in sentence


def test_the_mean_over_hospitals_has_the_interval_of_a_paired_t_test(tmp_path: Path) -> None:
    leads = np.array([own - shared for shared, own in AREAS.values()])
    low, high = ttest_1samp(leads, 0.0).confidence_interval()
    (sentence,) = personal_sentences(run_with(tmp_path, AREAS))
    spelled = f"{leads.mean():.3f} on average over these hospitals (95% CI {low:.3f} to {high:.3f}".replace("-", "−")
    assert spelled in sentence


def test_the_table_has_both_models_the_difference_and_the_images_behind_them(tmp_path: Path) -> None:
    rows = {row.name: row for row in personal_table(run_with(tmp_path, AREAS))}
    assert list(rows) == sorted(AREAS)
    north = rows["north"]
    assert (north.images, north.shared.number, north.own.number, north.lead.number) == ("40 + 60", "0.800", "0.970", "0.170")
    page = html.unescape(write_report(tmp_path).read_text("utf-8"))
    assert "Each hospital's own model" in page and "0.170" in page and "2 of 4 hospitals do better" in " ".join(page.split())


def test_a_hospital_with_images_of_one_class_is_not_counted_as_better_or_worse(tmp_path: Path) -> None:
    (sentence,) = personal_sentences(run_with(tmp_path, {"north": (0.8, 0.9), "south": (None, None)}))
    assert "1 of 1 hospital does better with its own model (north), 0 worse;" in sentence
    assert "Of 1 hospital more it cannot be told" in sentence
    (none,) = personal_sentences(run_with(tmp_path / "none", {"south": (None, None)}))
    assert "none has validation images of both classes" in none


@pytest.mark.parametrize(("secure", "word"), [(True, "secure aggregation"), (False, "no statistics of one left")])
def test_where_none_was_judged_it_says_why(tmp_path: Path, secure: bool, word: str) -> None:
    changes: dict[str, Any] = {"secure_aggregation": {"enabled": secure}, **DITTO}
    RunMaker(tmp_path, **changes).rounds(1).end("succeeded", sets=("test",))
    (sentence,) = personal_sentences(read_run(tmp_path))
    assert word in sentence


def test_a_run_without_own_models_has_neither_sentence_nor_table(tmp_path: Path) -> None:
    RunMaker(tmp_path).rounds(1).end("succeeded", sets=("test",))
    assert personal_sentences(read_run(tmp_path)) == []
    assert "own model" not in write_report(tmp_path).read_text("utf-8")
