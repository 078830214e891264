"""The coordinator's metrics for Prometheus: read from registry and run folders at each scrape, nothing that the page does not show.

No label names a site. Single runs are those that go on and the newest one, so that the number of series stays small over years. Counts are
of the whole run, over every resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pneumofed.common.errors import PneumofedError
from pneumofed.server.dashboard.views import SHOWN_METRICS
from pneumofed.server.operations.overview import Overview, build_links, round_now, site_states
from pneumofed.server.runs.events import EVENTS_FILE, Kind, read_activity
from pneumofed.server.runs.folder import RunFolder, best_round
from pneumofed.server.runs.records import RoundRecord, RunState
from pneumofed.server.runs.registry import Registry
from pneumofed.server.runs.runs import read_experiment
from pneumofed.server.runs.status import read_history
from pneumofed.server.runs.tables import RunRow

FAILURES = (Kind.LATE, Kind.REFUSED, Kind.LOST, Kind.FAILED, Kind.LEFT_OUT)
PARTS = ("train", "aggregate", "evaluate", "central")


class CoordinatorMetrics(Collector):
    """What one scrape finds.

    Args:
        registry: of sites and runs.
        overview: the page's last look at processes and sites; None before the first one.
    """

    def __init__(self, registry: Registry, overview: Overview | None) -> None:
        self._registry, self._overview = registry, overview

    def text(self) -> bytes:
        """Formats all of it in Prometheus's text format."""
        scrape = CollectorRegistry(auto_describe=False)
        scrape.register(self)
        return generate_latest(scrape)

    def describe(self) -> list[Metric]:
        """Nothing is read before the scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the families of this scrape."""
        runs = self._registry.runs()
        chosen = [run for run in runs if not RunState(run.state).final] or runs[:1]
        seen = [_SeenRun(run) for run in chosen]
        yield _gauge("pneumofed_runs", "Runs by state.", "state", _with_zeros(Counter(run.state for run in runs), RunState))
        yield from self._federation(seen)
        for make in (_courses, _counts, _seconds, _results):
            yield from make(seen)

    def _federation(self, seen: list[_SeenRun]) -> Iterator[Metric]:
        known, overview = self._registry.sites(), self._overview
        links = overview.links if overview else build_links(known, None)
        events = next((run.events for run in seen if not run.final), [])
        states: Counter[str] = Counter(now.state for now in site_states(links, events, datetime.now(UTC)).values())
        yield _gauge("pneumofed_sites", "Sites by what they do now, as the page says it.", "state", states)
        connected = sum(link.connected is True for link in links.values())
        yield GaugeMetricFamily("pneumofed_sites_connected", "Sites whose SuperNode is connected.", connected)
        serving = {process.name: int(process.serving) for process in (overview.processes if overview else ())}
        yield _gauge("pneumofed_process_serving", "Whether a process of the coordinator answers.", "process", serving)
        if overview:
            looked = "When processes and sites were looked at last."
            yield GaugeMetricFamily("pneumofed_looked_timestamp_seconds", looked, overview.taken.timestamp())


class _SeenRun:
    """A run, read once for a scrape."""

    def __init__(self, run: RunRow) -> None:
        folder = RunFolder(Path(run.folder))
        self.name, self.final = run.name, RunState(run.state).final
        self.history, self.events = read_history(folder), read_activity(folder.path / EVENTS_FILE)
        try:
            self.planned = read_experiment(run).rounds
        except PneumofedError:  # a run of an older version, whose schema was another
            self.planned = 0

    @property
    def last(self) -> RoundRecord:
        return self.history[-1] if self.history else RoundRecord(round=0)


def _courses(seen: list[_SeenRun]) -> Iterator[Metric]:
    now = {run.name: found.number for run in seen if not run.final and (found := round_now(run.events))}
    yield _gauge("pneumofed_run_round", "The round that goes on; 0 between rounds and after the end.", "run", _all(seen, now))
    yield _gauge("pneumofed_run_rounds_completed", "Completed rounds.", "run", {run.name: len(run.history) for run in seen})
    yield _gauge("pneumofed_run_rounds_planned", "Rounds of the experiment.", "run", {run.name: run.planned for run in seen})
    best = {run.name: best_round(run.history) for run in seen}
    yield _gauge("pneumofed_run_best_round", "The round whose model is kept; 0 without one.", "run", best)
    drawn = GaugeMetricFamily("pneumofed_run_round_sites", "Sites of the last completed round.", labels=["run", "part"])
    for run in seen:
        parts = {"asked": run.last.drawn, "trained": run.last.trained, "in trouble": run.last.trouble}
        for part, sites in parts.items():
            drawn.add_metric([run.name, part], len(sites))
    yield drawn


def _counts(seen: list[_SeenRun]) -> Iterator[Metric]:
    answers = CounterMetricFamily("pneumofed_run_answers", "Answers of sites, by task.", labels=["run", "task"])
    failures = CounterMetricFamily(
        "pneumofed_run_failures", "Answers that failed or did not come, by kind.", labels=["run", "kind"]
    )
    sizes = CounterMetricFamily("pneumofed_run_bytes", "Bytes of weights in completed rounds.", labels=["run", "direction"])
    for run in seen:
        tasks = Counter(_task(event) for event in run.events if event["kind"] == Kind.ANSWERED)
        for task, number in sorted(tasks.items()):
            answers.add_metric([run.name, task], number)
        kinds = Counter(event["kind"] for event in run.events if not event.get("arrived"))
        for kind in FAILURES:
            failures.add_metric([run.name, kind.value], kinds[kind])
        for direction in ("down", "up"):
            sizes.add_metric([run.name, direction], sum(getattr(line.bytes, direction) for line in run.history))
    yield from (answers, failures, sizes)


def _seconds(seen: list[_SeenRun]) -> Iterator[Metric]:
    last = GaugeMetricFamily("pneumofed_run_round_seconds", "Wall time of the last completed round.", labels=["run"])
    parts = GaugeMetricFamily("pneumofed_run_round_part_seconds", "The same by part of the round.", labels=["run", "part"])
    total = CounterMetricFamily("pneumofed_run_rounds_seconds", "Wall time of all completed rounds.", labels=["run"])
    for run in seen:
        if (seconds := run.last.seconds.total) is not None:
            last.add_metric([run.name], seconds)
        for part in PARTS:
            if (taken := getattr(run.last.seconds, part)) is not None:
                parts.add_metric([run.name, part], taken)
        total.add_metric([run.name], sum(line.seconds.total or 0.0 for line in run.history))
    yield from (last, parts, total)


def _results(seen: list[_SeenRun]) -> Iterator[Metric]:
    """Of the last completed round, on pooled validation and on the coordinator's sets; and what sites say of privacy."""
    metrics = GaugeMetricFamily("pneumofed_run_metric", "Metrics of the last completed round.", labels=["run", "set", "metric"])
    epsilon = GaugeMetricFamily("pneumofed_run_largest_epsilon", "Largest epsilon that a site says it has spent.", labels=["run"])
    for run in seen:
        for name, found in run.last.measured.items():
            values: Mapping[str, Any] = {key: getattr(found, key) for key in (*SHOWN_METRICS, "log_loss")}
            for key, value in values.items():
                if value is not None:
                    metrics.add_metric([run.name, name, key], value)
        spent = [value for line in run.history for value in line.epsilons.values()]
        if spent:
            epsilon.add_metric([run.name], max(spent))
    yield from (metrics, epsilon)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _with_zeros(found: Counter[str], kinds: type[RunState]) -> dict[str, float]:
    return {kind.value: found[kind.value] for kind in kinds}


def _all(seen: list[_SeenRun], known: Mapping[str, int]) -> dict[str, float]:
    return {run.name: known.get(run.name, 0) for run in seen}


def _task(event: Mapping[str, Any]) -> str:
    return str(event.get("task") or "unknown")
