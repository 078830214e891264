"""What the page's JSON interface answers, read from the registry and the run folder.

Nothing is stored. Everything optional is null where it is not known: a number here was measured, and a missing one stays missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import PneumofedError
from pneumofed.common.ops.study_code import describe_name
from pneumofed.server.operations.overview import round_now
from pneumofed.server.runs.events import EVENTS_FILE, read_activity
from pneumofed.server.runs.folder import RunFolder, best_round
from pneumofed.server.runs.records import Metrics, RoundRecord, RunState, SiteTraining, SiteValidation
from pneumofed.server.runs.runs import read_experiment
from pneumofed.server.runs.status import read_history, read_summary
from pneumofed.server.runs.summary_records import MetricInterval
from pneumofed.server.runs.tables import RunRow

SHOWN_METRICS = ("auroc", "sensitivity", "specificity", "accuracy")
FILE_NAME = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\]\S")


class TokenLogin(BaseModel):
    """A token, to be changed for a session."""

    token: str = Field(max_length=512)


class Viewer(BaseModel):
    """Who looks."""

    name: str
    role: str
    csrf: str | None = None


class PageHealth(BaseModel):
    """That the page answers; nothing of the federation, since anybody may ask."""

    status: str = "ok"


class RunLine(BaseModel):
    """A run in the list."""

    name: str
    state: str
    reason: str
    submitted: datetime
    started: datetime | None
    ended: datetime | None
    rounds_completed: int
    rounds: int


class CurrentRound(BaseModel):
    """The round that goes on."""

    number: int
    started: datetime
    deadline: datetime | None


class RoundLine(BaseModel):
    """A completed round: pooled results and what it cost."""

    round: int
    drawn: int
    good: int
    validation_auroc: float | None
    test_auroc: float | None
    external_auroc: float | None
    train_loss: float | None
    validation_loss: float | None
    test_loss: float | None
    external_loss: float | None
    held_out_auroc: dict[str, float | None]
    """By name, of the other held-out sets, as the loss below."""
    held_out_loss: dict[str, float | None]
    seconds: float | None
    bytes_down: int
    bytes_up: int
    trouble: dict[str, str]
    staleness: dict[str, int]
    """By site, of the updates of an asynchronous round."""


class SiteMetrics(BaseModel):
    """A site's numbers in the last round in which it took part."""

    name: str
    round: int
    images: int | None
    train_loss: float | None
    train_sec: float | None
    auroc: float | None
    sensitivity: float | None
    specificity: float | None
    validation_images: int | None
    rounds_answered: int
    rounds_drawn: int
    staleness: int | None
    """In asynchronous rounds: how many rounds old the weights were that its last update began from."""


class IntervalView(BaseModel):
    """A result with its confidence interval."""

    value: float | None
    low: float | None
    high: float | None


class PrivacyView(BaseModel):
    """Epsilon spent by site, as the sites report it. Empty means that the run has no differential privacy."""

    epsilon: dict[str, float]


class RunDetail(RunLine):
    """A run in full."""

    title: str
    strategy: str
    model: str
    seed: int
    round_timeout_sec: float
    min_sites: int
    app_hash: str | None
    round_now: CurrentRound | None
    course: list[RoundLine]
    sites: list[SiteMetrics]
    results: dict[str, dict[str, IntervalView]]
    best_round: int
    privacy: PrivacyView
    bytes_down: int
    bytes_up: int
    seconds: float


class SiteLine(BaseModel):
    """A site and what it does now."""

    name: str
    state: str
    detail: str
    fingerprint: str
    first_seen: datetime | None
    last_seen: datetime | None


class ProcessLine(BaseModel):
    """One of the coordinator's processes."""

    name: str
    serving: bool
    detail: str


class Sites(BaseModel):
    """Sites and processes; `taken` is when they were asked last."""

    taken: datetime | None
    sites: list[SiteLine]
    processes: list[ProcessLine]


class EventLine(BaseModel):
    """One line of the activity log."""

    id: int
    time: datetime
    run: str | None
    round: int | None
    site: str | None
    kind: str
    text: str


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
        model=describe_name(experiment.model.name),
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
        staleness=dict(line.staleness),
    )


def _sites(history: Sequence[RoundRecord]) -> list[SiteMetrics]:
    names = sorted({name for line in history for name in (*line.sites, *line.drawn)})
    return [_site(name, history) for name in names]


def _site(name: str, history: Sequence[RoundRecord]) -> SiteMetrics:
    took_part = [(line.round, line.sites[name]) for line in history if name in line.sites]
    number = took_part[-1][0] if took_part else 0
    trained = [site.train for _, site in took_part if site.train]
    judged = [site.validation for _, site in took_part if site.validation]  # not after every round
    train, validated = (trained[-1] if trained else SiteTraining()), (judged[-1] if judged else SiteValidation())
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
        staleness=next((line.staleness[name] for line in reversed(history) if name in line.staleness), None),
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
