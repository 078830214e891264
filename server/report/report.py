"""The report of a run: one HTML file that needs nothing else, for clinicians and engineers, in any state of the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pneumofed.common.config.classes import in_words, positive_word
from pneumofed.common.errors import counted
from pneumofed.common.ops.render import Filters, render
from pneumofed.server.report.class_results import class_tables
from pneumofed.server.report.course import (
    describe_course,
    describe_ending,
    describe_privacy,
    environment_rows,
    incidents,
    reproducing_command,
)
from pneumofed.server.report.cross_site import draw_matrix, matrix_table
from pneumofed.server.report.figures import (
    draw_baselines,
    draw_course,
    draw_examples,
    draw_hospitals,
    draw_results,
    write_pictures,
)
from pneumofed.server.report.many import distributions
from pneumofed.server.report.news import gain_table, news, subgroup_tables
from pneumofed.server.report.numbers import approximate, number, whole
from pneumofed.server.report.personal import alone_table, personal_table
from pneumofed.server.report.read_run import StoredRun, read_run
from pneumofed.server.report.results import (
    class_counts,
    class_names,
    comparisons,
    data_rows,
    describe_partition,
    describe_spread,
    hospital_rows,
    metric_rows,
    result_tiles,
    run_tiles,
    untrained,
)
from pneumofed.server.report.wording import describe_drops, describe_policy, limits, summary_sentences, warn_of_few, with_interval
from pneumofed.server.runs.folder import write_text
from pneumofed.server.runs.records import Metrics, set_noun
from pneumofed.server.runs.summary_records import ParentBundle

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
TEMPLATE_FILTERS: Filters = {"number": number, "whole": whole, "bracketed": lambda found: with_interval(found, "95% CI")}


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` of the run in `run_dir`, and its pictures as PNG beside it, and returns the report's path.

    Works in any state of a run; what is missing is left out, what is damaged is named.

    Raises:
        OSError: the folder cannot be written.
    """
    run = read_run(Path(run_dir))
    context = _context(run)
    write_pictures([picture for key in context if key.endswith("_pictures") for picture in context[key]], run.folder.figure)
    filters = {**TEMPLATE_FILTERS, "for_task": lambda text: in_words(text, run.classes)}
    write_text(run.folder.report, render(__package__, "report.html", filters, **context))
    return run.folder.report


def close_with_report(run_dir: Path) -> bool:
    """Writes the report of a run that ended and returns whether that worked. A failure is logged: it must not fail a good run."""
    try:
        write_report(run_dir)
    except Exception:
        logger.exception("the report of %s could not be written; `pneumofed report %s` tries again", run_dir, run_dir)
        return False
    return True


def _context(run: StoredRun) -> dict[str, Any]:
    return {
        "run": run,
        "sets": {name: set_noun(name) for name in run.sets},
        "ending": describe_ending(run),
        "sentences": [*summary_sentences(run), *news(run)],
        "result_tiles": result_tiles,
        "run_tiles": run_tiles(run),
        "images_noun": "CT of the chest" if run.experiment and run.experiment.image.slices else "chest radiographs",
        "few": warn_of_few(run),
        "limits": limits(run),
        "privacy": describe_privacy(run),
        **_results(run),
        **_sites(run),
        **_course(run),
        **_reproduction(run),
    }


def _results(run: StoredRun) -> dict[str, Any]:
    evaluated = [name for name in run.sets if run.results(name)]
    validation = run.summary.validation or (run.reported_line and run.reported_line.validation) or Metrics()
    images = validation.n or 0
    return {
        "evaluated": evaluated,
        "metric_rows": metric_rows(run, evaluated),
        "interval_note": _interval_note(run, evaluated),
        "provisional": not all(run.is_final(name) for name in evaluated),
        "drops": describe_drops(run),
        "positive": positive_word(run.classes),
        "class_tables": class_tables(run, evaluated),
        "subgroups": subgroup_tables(run),
        "policy": describe_policy(run),
        "validation": approximate(validation),
        "validation_size": f" ({counted(images, 'image')})" if images else "",
        "result_pictures": draw_results(run),
        "example_pictures": draw_examples(run),
        "comparisons": comparisons(run),
        "gains": gain_table(run),
        "untrained": untrained(run),
        "baseline_pictures": draw_baselines(run),
    }


def _sites(run: StoredRun) -> dict[str, Any]:
    rows = hospital_rows(run)
    return {
        "class_names": class_names(run),
        "hospital_rows": rows,
        "asynchronous": any(row.staleness for row in rows),
        "spread": describe_spread(rows),
        "distributions": distributions(run),
        "personal": personal_table(run),
        "alone": alone_table(run),
        "matrix": matrix_table(run),
        "matrix_pictures": draw_matrix(run),
        "partition": describe_partition(run),
        "hospital_pictures": draw_hospitals(class_counts(run), class_names(run)),
        "absent": run.absent(),
        "data_rows": data_rows(run),
    }


def _course(run: StoredRun) -> dict[str, Any]:
    return {"course_pictures": draw_course(run), "incidents": incidents(run.history), "course": describe_course(run)}


def _reproduction(run: StoredRun) -> dict[str, Any]:
    folder = run.folder.path
    return {
        "seed": run.experiment.seed if run.experiment else run.summary.seed if run.summary.seed is not None else UNKNOWN,
        "parent": _parent(run.summary.parent),
        "code": _code(run.environment.get("git")),
        "command": reproducing_command(run),
        "config": _text(run.folder.config),
        "simulation": _text(folder / "simulation.yaml"),
        "environment": environment_rows(run),
        "version": _version(),
        "written": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
    }


def _parent(parent: ParentBundle | None) -> str:
    """The model bundle that the run started from; empty for random or general first weights."""
    if parent is None:
        return ""
    privately = {True: ", trained with differential privacy", False: ", trained without differential privacy"}
    how = "" if parent.trained_privately is None else privately[parent.trained_privately]
    return f"model bundle {parent.name or ''} {parent.digest}{how}"


def _interval_note(run: StoredRun, evaluated: list[str]) -> str:
    if all(run.is_final(name) for name in evaluated):
        samples = run.experiment.evaluation.bootstrap_samples if run.experiment else None
        if samples == 0:
            return "no intervals, as the experiment asked for"
        drawn = f"{samples:,} " if samples else ""
        return f"{run.interval_name(evaluated[0])}" + f" of {drawn}bootstrap resamples of patients" if evaluated else ""
    return "95% CI from counts (Newcombe 2006, Wilson 1927; images of one patient count as independent)"


def _code(git: Mapping[str, Any] | None) -> str:
    if not git:
        return "no git checkout; the commit is unknown"
    changed = "with uncommitted changes, so the commit alone does not give this code" if git.get("dirty") else "without changes"
    return f"commit {git.get('commit')}, {changed}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _version() -> str:
    try:
        return version("pneumofed")
    except PackageNotFoundError:
        return "(version unknown: run from a copy that is not installed)"
