"""What of a run is tracked, read from its folder: settings, what it ran on, numbers by round, and the final results with their intervals.

Only counts, metrics and settings that every party of the run knows anyway: no path, no sentence of a site, no metric under a name that a
site made up, nothing of subgroups, and of a patient nothing that the run folder would have. Names of numbers are the same at every target:

    validation/auroc  test/auroc  external/auroc  SET/...   by held-out set; validation is the sites' pooled
    train/loss                                              mean over the sites' images
    round/seconds  round/sites_trained  round/failures ...
    site/NAME/auroc  site/NAME/train_loss ...               at most `MAX_SITES` sites
    final/SET/auroc  ..._low  ..._high                      of the kept round, once the run has succeeded
    baseline/pooled/SET/auroc  baseline/alone/SET/auroc_mean
    cross_site/MODEL/SITE                                   AUROC of a site's own model, or of `global`, on a site's patients
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from pneumofed.common.config.classes import MOST_CLASSES
from pneumofed.common.config.reader import read_yaml
from pneumofed.server.runs.events import EVENTS_FILE, Kind, read_activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord, RunState, SiteRound
from pneumofed.server.runs.summary_records import BaselineTable, CrossSiteMatrix, Results, RunSummary
from pneumofed.server.tracking.targets import TrackedRun

MARKER = "round/completed"
"""Stands in every round, after all others: a target that has it has the round."""
MAX_SITES = 100
"""Of a run with more of them single sites are not tracked; the run folder has them."""
MOST_CELLS = 1000
METRICS = (
    "auroc", "average_precision", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "precision", "f1", "mcc", "brier",
    "ece", "log_loss", "accuracy_three_class", "auroc_macro", "sensitivity_macro", "n", "n_positive",
    *(f"{name}_class_{k}" for k in range(MOST_CLASSES) for name in ("auroc", "sensitivity", "specificity")),
)  # fmt: skip
TRAINING = (
    "num_examples", "train_loss", "train_accuracy", "steps", "learning_rate", "train_sec", "images_per_sec", "epsilon",
)  # fmt: skip
DRAWN = "These are drawn images: the numbers say nothing about patients."
SIMULATION_KEYS = ("hospitals", "partition", "alpha", "phantom_patients", "threads")
"""Of simulation.yaml; the others name places on a disk."""


@dataclass(frozen=True)
class TrackedRound:
    """The numbers of one round, and when it was done, in milliseconds since 1970; the same at each reading."""

    round: int
    time_ms: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class TrackedFacts:
    """What there is to track of a run now.

    Attributes:
        study: name of the experiment.
        params: settings by dotted key, which never change.
        tags: what else describes the run; may change while it goes on.
        note: a sentence that must stand beside the numbers; may be empty.
        rounds: completed ones that no resume will repeat.
        final: results by name; empty before the run has succeeded.
        state: of the run.
        started_ms, ended_ms: the latter is of the last sign of life.
    """

    study: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    rounds: Sequence[TrackedRound] = ()
    final: Mapping[str, float] = field(default_factory=dict)
    state: RunState = RunState.RUNNING
    started_ms: int = 0
    ended_ms: int = 0

    @property
    def last_round(self) -> int:
        return self.rounds[-1].round if self.rounds else 0


def gather_facts(folder: RunFolder, tracked: TrackedRun) -> TrackedFacts | None:
    """Reads what there is to track; None before the run has begun.

    Args:
        folder: of the run.
        tracked: how it is tracked: whether with results on held-out sets, and its app bundle.

    Raises:
        PneumofedError: a file of the run folder is damaged.
        OSError: it cannot be read.
    """
    if not folder.config.exists():
        return None
    held_out = tracked.held_out
    experiment, summary, history = folder.read_config(), folder.read_summary(), folder.read_history()
    simulation = _read_simulation(folder)
    drawn = summary.phantom if summary.phantom is not None else bool(simulation) and _draws(simulation)
    state = RunState(summary.status) if summary.status in set(RunState) else RunState.SUBMITTED
    times, started = _times(folder, history)
    settled = history if (is_done := state == RunState.SUCCEEDED) else history[: _settled(folder, history)]
    return TrackedFacts(
        study=experiment.name,
        params={**_params(experiment.model_dump()), **_simulation_params(simulation)},
        tags=_tags(folder, summary, tracked.app, simulated=bool(simulation), drawn=drawn),
        note=DRAWN if drawn else "",
        rounds=[TrackedRound(line.round, times[line.round], round_numbers(line, held_out)) for line in settled],
        final=final_numbers(summary, held_out) | cross_site_numbers(folder.read_cross_site()) if is_done else {},
        state=state,
        started_ms=started,
        ended_ms=_milliseconds(folder.summary.stat().st_mtime) if folder.summary.exists() else started,
    )


def _settled(folder: RunFolder, history: Sequence[RoundRecord]) -> int:
    """How many rounds no resume repeats: the last line is one of them once the checkpoint, which comes after it, is there."""
    try:
        checkpoint = folder.last_checkpoint.stat().st_mtime_ns
        return len(history) if checkpoint >= folder.history.stat().st_mtime_ns else max(len(history) - 1, 0)
    except FileNotFoundError:
        return 0


def round_numbers(line: RoundRecord, held_out: bool = True) -> dict[str, float]:
    """Lists the numbers of a round by name, `MARKER` last; what is not known, is withheld or is no number is left out.

    Args:
        line: the round.
        held_out: whether results on held-out sets are among them.
    """
    found: dict[str, Any] = {}
    for name, measured in line.measured.items():
        if held_out or name == "validation":
            found |= _of(measured, METRICS, f"{name}/")
    found["validation/threshold"] = line.threshold.value if line.threshold else None
    secure = line.secure_sum
    found["train/loss"] = secure.train_loss if secure and secure.train_loss is not None else line.mean_train_loss
    found["train/accuracy"] = secure.train_accuracy if secure else None
    found |= {
        "round/sites_drawn": len(line.drawn),
        "round/sites_trained": len(line.trained),
        "round/failures": len(line.failures),
        "round/left_out": len(line.left_out),
        "round/late": len(line.late),
        "round/bytes_down": line.bytes.down,
        "round/bytes_up": line.bytes.up,
        "round/rate_factor": line.rate_factor,
        "round/largest_staleness": max(line.staleness.values(), default=None),
        "round/simulated_time": line.simulated_time,
        "round/seconds": line.seconds.total,
        **{f"round/seconds_{part}": getattr(line.seconds, part) for part in ("train", "aggregate", "evaluate", "central")},
        "privacy/central_epsilon": line.central_epsilon,
        "privacy/largest_epsilon": max(line.epsilons.values(), default=None),
    }
    if len(line.sites) <= MAX_SITES:
        for name, site in line.sites.items():
            found |= _site_numbers(name, site)
    return {**_numbers(found), MARKER: float(line.round)}


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64]


def _site_numbers(name: str, site: SiteRound) -> dict[str, Any]:
    place = f"site/{_plain(name)}/"
    found = _of(site.train, TRAINING, place) if site.train else {}
    found |= _of(site.validation, METRICS, place) if site.validation else {}
    return found | (_of(site.personal, METRICS, f"{place}personal_") if site.personal else {})


def final_numbers(summary: RunSummary, held_out: bool = True) -> dict[str, float]:
    """Lists the final results by name, each metric with its interval (`_low`, `_high`), and those of the baselines.

    Args:
        summary: of a run that succeeded.
        held_out: whether results on held-out sets are among them.
    """
    found: dict[str, Any] = {
        "final/best_round": summary.best_round,
        "final/rounds": summary.rounds_completed,
        "final/seconds": summary.seconds,
        "final/bytes": summary.bytes.total if summary.bytes else None,
        "final/threshold": summary.threshold.value if summary.threshold else None,
    }
    if summary.validation:
        found |= _of(summary.validation, METRICS, "final/validation/")
    if held_out:
        for name, results in summary.results.items():
            found |= _intervals(results, f"final/{name}/")
        found |= _baseline_numbers(summary.baselines) if summary.baselines else {}
    return _numbers(found)


def cross_site_numbers(matrix: CrossSiteMatrix | None) -> dict[str, float]:
    """Lists each model's AUROC on each site's patients by name, as far as it was told; nothing of a matrix of more than `MOST_CELLS`."""
    if matrix is None or (len(matrix.own) + 1) * len(matrix.hospitals) > MOST_CELLS:
        return {}
    rows = {"global_model" if "global" in matrix.own else "global": matrix.shared, **matrix.own}.items()
    return _numbers({f"cross_site/{_plain(model)}/{_plain(site)}": one.auroc for model, row in rows for site, one in row.items()})


def _baseline_numbers(table: BaselineTable) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if table.pooled:
        for name, results in table.pooled.results.items():
            found |= _intervals(results, f"baseline/pooled/{name}/")
    for name, spreads in table.alone_summary.items():
        for metric in METRICS:
            if spread := spreads.get(metric):
                place = f"baseline/alone/{name}/{metric}"
                found |= {f"{place}_{kind}": getattr(spread, kind) for kind in ("mean", "best", "worst")}
    for name, lead in table.lead.items():
        leads = {"pooled": lead.over_pooled, "best_alone": lead.over_best_alone}
        for other, interval in leads.items():
            found |= _intervals({f"auroc_lead_over_{other}": interval}, f"baseline/{name}/", known=None) if interval else {}
    return found


def _intervals(results: Results, place: str, known: Sequence[str] | None = METRICS) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric, interval in results.items():
        if known is None or metric in known:
            found |= {
                f"{place}{metric}": interval.value,
                f"{place}{metric}_low": interval.low,
                f"{place}{metric}_high": interval.high,
            }
    return found


def _of(record: Any, names: Sequence[str], place: str) -> dict[str, Any]:
    return {f"{place}{name}": getattr(record, name, None) for name in names}


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Those that are numbers: a site's own report may hold anything."""
    finite = {name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: float(value) for name, value in finite.items() if math.isfinite(value)}


def _params(values: Mapping[str, Any]) -> dict[str, str]:
    """The experiment's keys; of a file with weights the name without its folder."""
    found = dict(_flat(values))
    if "model.weights" in found:
        found["model.weights"] = PurePath(found["model.weights"]).name
    return found


def _flat(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value if isinstance(value, str) else json.dumps(value)


def _read_simulation(folder: RunFolder) -> dict[str, Any]:
    path = folder.path / "simulation.yaml"
    return dict(read_yaml(path)) if path.exists() else {}


def _draws(simulation: Mapping[str, Any]) -> bool:
    return simulation.get("data") is None and not simulation.get("sources")


def _simulation_params(simulation: Mapping[str, Any]) -> dict[str, str]:
    return dict(_flat({key: simulation[key] for key in SIMULATION_KEYS if key in simulation}, "simulation."))


def _tags(folder: RunFolder, summary: RunSummary, app: str, *, simulated: bool, drawn: bool) -> dict[str, str]:
    images = "drawn" if drawn else "radiographs"
    found = {
        "pneumofed.version": version("pneumofed"),
        "pneumofed.kind": "simulation" if simulated else "federation",
        "pneumofed.images": images,
        "pneumofed.status": summary.status or RunState.SUBMITTED.value,
        "pneumofed.app_bundle": summary.app_bundle or app,
        "pneumofed.parent_bundle": summary.parent.digest if summary.parent else "",
    }
    environment = _read_environment(folder)
    packages, git = environment.get("packages") or {}, environment.get("git") or {}
    found |= {
        "pneumofed.python": environment.get("python") or "",
        "pneumofed.torch": packages.get("torch") or "",
        "pneumofed.flwr": packages.get("flwr") or "",
        "pneumofed.accelerator": environment.get("accelerator") or "",
        "pneumofed.commit": f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else "",
    }
    return {name: text for name, text in found.items() if isinstance(text, str) and text}


def _read_environment(folder: RunFolder) -> dict[str, Any]:
    try:
        found = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _times(folder: RunFolder, history: Sequence[RoundRecord]) -> tuple[dict[int, int], int]:
    """When each round was done and when the run began, by the event lines; without a line, counted back from the file by seconds."""
    events = read_activity(folder.path / EVENTS_FILE)
    done = {event["round"]: event["time"] for event in events if event["kind"] == Kind.ROUND_DONE}
    times: dict[int, int] = {}
    later = _milliseconds(folder.history.stat().st_mtime) if folder.history.exists() else 0
    for line in reversed(history):
        times[line.round] = _read_time(done.get(line.round)) or later
        later = times[line.round] - round(1000 * (line.seconds.total or 0.0))
    began = [event["time"] for event in events if event["kind"] == Kind.RUN_STARTED]
    fallback = later or _milliseconds(folder.config.stat().st_mtime)
    return times, (_read_time(began[-1]) if began else None) or fallback


def _read_time(text: object) -> int | None:
    try:
        return _milliseconds(datetime.fromisoformat(str(text)).timestamp())
    except ValueError:
        return None


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def sweep_facts(study: str, name: str, values: Mapping[str, float], tags: Mapping[str, str], state: RunState) -> TrackedFacts:
    """Returns what is tracked of a sweep itself, now.

    Args:
        study: name of the experiment.
        name: of the sweep.
        values: numbers of the chosen setting.
        tags: what was chosen.
        state: succeeded once all runs are done.
    """
    all_tags = {"pneumofed.version": version("pneumofed"), "pneumofed.kind": "sweep", "pneumofed.status": state.value, **tags}
    now = _milliseconds(time.time())
    return TrackedFacts(study, {}, all_tags, f"Sweep {name}", (), dict(values), state, now, now)
