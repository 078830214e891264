"""What the page shows, read from the registry and the run folder. Nothing is stored; a missing number stays missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import PneumofedError
from pneumofed.server.dashboard.schema import CurrentRound, IntervalView, PrivacyView, RoundLine, RunDetail, RunLine, SiteMetrics
from pneumofed.server.operations.overview import round_now
from pneumofed.server.runs.events import EVENTS_FILE, read_activity
from pneumofed.server.runs.folder import RunFolder, best_round
from pneumofed.server.runs.records import Metrics, RoundRecord, RunState, SiteRound, SiteTraining, SiteValidation
from pneumofed.server.runs.runs import read_experiment
from pneumofed.server.runs.status import read_history, read_summary
from pneumofed.server.runs.summary_records import MetricInterval
from pneumofed.server.runs.tables import RunRow

SHOWN_METRICS = ("auroc", "sensitivity", "specificity", "accuracy")
FILE_NAME = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\]\S")


def run_line(run: RunRow, full: bool) -> RunLine:
    """Shows the run as a line of the list.

    Args:
        run: its row in the registry.
        full: whether its reason is shown whole; without it file names are cut out.
    """
    return RunLine(**_line(run, full, len(read_history(RunFolder(Path(run.folder))))))


def view_run(run: RunRow, full: bool) -> RunDetail:
    """Shows the run with its rounds, its sites' numbers and its results.

    Args:
        run: its row in the registry.
        full: whether its reason is shown whole; without it file names are cut out.
    """
    history = read_history(RunFolder(Path(run.folder)))
    experiment = _experiment(run)
    return RunDetail(
        **_line(run, full, len(history)),
        title=experiment.name,
        strategy=experiment.strategy.name,
        model=experiment.model.name,
        seed=experiment.seed,
        round_timeout_sec=experiment.strategy.round_timeout_sec,
        min_sites=experiment.strategy.replies_needed,
        app_hash=run.app_hash,
        round_now=_round_now(run),
        course=[_round(line) for line in history],
        sites=_sites(history),
        results=_results(run),
        best_round=best_round(history),
        privacy=_privacy(history),
        bytes_down=sum(line.bytes.down for line in history),
        bytes_up=sum(line.bytes.up for line in history),
        seconds=sum(line.seconds.total or 0.0 for line in history),
    )


def without_paths(text: str) -> str:
    """Cuts `text` at the first file name in it, which may say more than an auditor should know."""
    found = FILE_NAME.search(text)
    return text if found is None else f"{text[: found.start()].rstrip()} … (the rest names files; the coordinator can see it)"


def _experiment(run: RunRow) -> ExperimentConfig:
    try:
        return read_experiment(run)
    except PneumofedError:  # a run of an older version, whose schema was another
        return ExperimentConfig()


def _line(run: RunRow, full: bool, completed: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "reason": run.reason if full else without_paths(run.reason),
        "submitted": run.submitted,
        "started": run.started,
        "ended": run.ended,
        "rounds_completed": completed,
        "rounds": _experiment(run).rounds,
    }


def _round_now(run: RunRow) -> CurrentRound | None:
    if RunState(run.state).final:
        return None
    found = round_now(read_activity(Path(run.folder) / EVENTS_FILE))
    return CurrentRound(number=found.number, started=found.started, deadline=found.deadline) if found else None


def _round(line: RoundRecord) -> RoundLine:
    validation, test, external = (found or Metrics() for found in (line.validation, line.test, line.external))
    return RoundLine(
        round=line.round,
        drawn=len(line.drawn),
        good=len(line.trained),
        validation_auroc=validation.auroc,
        test_auroc=test.auroc,
        external_auroc=external.auroc,
        train_loss=line.mean_train_loss,
        validation_loss=validation.log_loss,
        test_loss=test.log_loss,
        external_loss=external.log_loss,
        held_out_auroc={name: found.auroc for name, found in line.held_out.items()},
        held_out_loss={name: found.log_loss for name, found in line.held_out.items()},
        seconds=line.seconds.total,
        bytes_down=line.bytes.down,
        bytes_up=line.bytes.up,
        trouble=line.trouble,
    )


def _sites(history: Sequence[RoundRecord]) -> list[SiteMetrics]:
    names = sorted({name for line in history for name in (*line.sites, *line.drawn)})
    return [_site(name, history) for name in names]


def _site(name: str, history: Sequence[RoundRecord]) -> SiteMetrics:
    took_part = [(line.round, line.sites[name]) for line in history if name in line.sites]
    number, last = took_part[-1] if took_part else (0, SiteRound())
    trained = [site.train for _, site in took_part if site.train]
    train, validated = (trained[-1] if trained else SiteTraining()), last.validation or SiteValidation()
    return SiteMetrics(
        name=name,
        round=number,
        images=train.num_examples,
        train_loss=train.train_loss,
        train_sec=train.train_sec,
        auroc=validated.auroc,
        sensitivity=validated.sensitivity,
        specificity=validated.specificity,
        validation_images=validated.n,
        rounds_answered=len(trained),
        rounds_drawn=sum(name in line.drawn for line in history),
    )


def _results(run: RunRow) -> dict[str, dict[str, IntervalView]]:
    """The final model's results with intervals; nothing before the run has succeeded."""
    if run.state != RunState.SUCCEEDED:
        return {}
    summary = read_summary(RunFolder(Path(run.folder)))
    return {
        name: {key: _interval(found[key]) for key in SHOWN_METRICS if key in found} for name, found in summary.results.items()
    }


def _interval(found: MetricInterval) -> IntervalView:
    return IntervalView(value=found.value, low=found.low, high=found.high)


def _privacy(history: Sequence[RoundRecord]) -> PrivacyView:
    """The last epsilon that each site reported; without differential privacy no site reports one."""
    spent: dict[str, float] = {}
    for line in history:
        spent |= line.epsilons
    return PrivacyView(epsilon=spent)
