"""A sweep: the same study under several settings and seeds, the choice made on validation, the held-out sets opened once at the end.

    plan = plan_sweep(read_sweep(file), out)     every run, checked before the first begins
    table = run_sweep(plan, say, progress)       runs what is missing, goes on with what was begun; the table so far lies in sweep.json

Each run has a folder of its own, OUT/SETTING/seed-N, and is the simulation that `pneumofed simulate` runs. A setting is chosen by the
mean over seeds of the validation AUROC of the round that each run kept. The held-out sets' results of the chosen setting, and of no
other, are in the table once all runs are done: a setting that was looked up on a test set has been chosen on it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.reader import build_config, differing_keys, merge, read_yaml
from pneumofed.common.errors import ConfigError, PneumofedError
from pneumofed.common.files import atomic_write
from pneumofed.common.folder_lock import owned
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.server.runs.folder import RunFolder, best_round, validation_auroc
from pneumofed.server.runs.records import Record, RunState
from pneumofed.server.tracking.follow import TrackedGroup
from pneumofed.server.tracking.targets import TrackingTarget
from pneumofed.simulation.plan import Plan, SimulationRequest, plan_simulation
from pneumofed.simulation.watch import Say

SWEEP_FILE = "sweep.json"
SIMULATION_KEYS = "simulation."
CONFIDENCE = 0.95
LONGEST_NAME = 100
"""Characters in the name of a setting's folder; a longer one is cut and ends with a part of its hash."""


class SweepConfig(Section):
    """A study, as its YAML file says it."""

    config: str | None = None
    """File or name of the configuration that all runs begin with, as `--config`."""
    simulation: dict[str, Any] = Field(default_factory=dict)
    """Keys of the virtual hospitals for all runs: data, hospitals, partition, ..."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of the experiment for all runs, nested."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by key, such as `strategy.name` or `simulation.alpha`; every combination is a setting."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = Field(default_factory=lambda: [0])


class Spread(Record):
    """A number over seeds: its mean, and the interval of Student's t with n - 1 degrees of freedom; none for one seed."""

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Computes the spread of at least one value."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean=mean, seeds=len(values))
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return cls(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


class SettingResult(Record):
    """What is known of a setting: validation only."""

    values: Mapping[str, Any]
    validation: Spread | None = None
    """AUROC of the rounds that were kept, pooled over the hospitals' validation patients; None before the first run is done."""
    by_seed: Mapping[str, float] = {}
    failed: Mapping[str, str] = {}
    """Reasons by seed."""


class SweepTable(Record):
    """A sweep so far.

    Attributes:
        settings: by name, in the order of the grid.
        chosen: name of the best on validation; None until all runs are done.
        lead: mean validation AUROC of the chosen minus that of the next, paired by seed; None with one setting.
        held_out: AUROC of the chosen setting on each held-out set; empty until all runs are done.
        runs, done: numbers of runs.
    """

    settings: Mapping[str, SettingResult]
    chosen: str | None = None
    next: str | None = None
    lead: Spread | None = None
    held_out: Mapping[str, Spread] = {}
    runs: int
    done: int


@dataclass(frozen=True)
class SweepRun:
    """One run: its setting's name and values, its seed, and what is asked of `simulate`."""

    setting: str
    values: Mapping[str, Any]
    seed: int
    request: SimulationRequest

    @property
    def key(self) -> tuple[str, int]:
        return self.setting, self.seed

    @property
    def name(self) -> str:
        """In the sweep, as its folder."""
        return f"{self.setting}/seed-{self.seed}"

    @property
    def folder(self) -> RunFolder:
        assert self.request.out is not None  # `plan_sweep` gives each run one
        return RunFolder(self.request.out)


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, seed by seed, so that every setting has been seen once before any is seen twice."""

    out: Path
    runs: tuple[SweepRun, ...]
    track: tuple[TrackingTarget, ...] = ()


def read_sweep(file: Path) -> SweepConfig:
    """Reads a study's file.

    Raises:
        ConfigError: it is missing, is no YAML, or has a wrong key or value.
    """
    return build_config(SweepConfig, read_yaml(file), file.name)


def plan_sweep(config: SweepConfig, out: Path, workers: int | None = None, track: Sequence[TrackingTarget] = ()) -> SweepPlan:
    """Makes every run's request and checks it; nothing is written.

    Args:
        config: the study.
        out: folder of the sweep.
        workers: as in `SimulationRequest`.
        track: where the runs are tracked, and the sweep's result.

    Raises:
        ConfigError: a key of a setting is wrong, two settings are the same, or a folder holds a run of other settings.
    """
    if "seed" in config.grid or "seed" in config.settings:
        raise ConfigError("seeds: seeds stand under `seeds`, since a setting is judged over all of them")
    keys = list(config.grid)
    settings = [dict(zip(keys, values, strict=True)) for values in itertools.product(*config.grid.values())]
    named = {_name_of(values): values for values in settings}
    if len(named) < len(settings):
        raise ConfigError("grid: a value stands twice under a key")
    runs = tuple(
        SweepRun(name, values, seed, _request(config, values, seed, out / name / f"seed-{seed}", workers))
        for seed in dict.fromkeys(config.seeds)
        for name, values in named.items()
    )
    for run in runs:
        _check(run)
    return SweepPlan(out, runs, tuple(track))


def run_sweep(plan: SweepPlan, say: Say, progress: Progress = NO_PROGRESS) -> SweepTable:
    """Runs what is missing, one run after the other. A run that fails is named in the table and the others go on.

    Args:
        plan: of the sweep.
        say: takes a sentence about each step.
        progress: shows how far the runs are.

    Returns:
        The table, which `sweep.json` in the sweep's folder holds too, also while it goes on.

    Raises:
        ConfigError: another process works in the sweep's folder.
    """
    from pneumofed.simulation.runner import run_simulation

    failed: dict[tuple[str, int], str] = {}
    table = SweepTable(settings={}, runs=len(plan.runs), done=0)
    with owned(plan.out, "sweep", "pneumofed sweep", "wait for it or choose another --out"):
        group, state = TrackedGroup(plan.out, plan.track), RunState.STOPPED
        try:
            for number, run in enumerate(plan.runs, 1):
                if not run.folder.has_succeeded:
                    say(f"run {number} of {len(plan.runs)}: {run.setting}, seed {run.seed}")
                    try:
                        run_simulation(replace(_begin_or_resume(run), tracking=group.member(run.name)), say, progress)
                    except PneumofedError as error:
                        failed[run.key] = error.public_message
                        say(f"{run.setting}, seed {run.seed} failed: {error}")
                else:
                    group.catch_up(run.folder, run.name)
                table = tabulate(plan, failed)
                with atomic_write(plan.out / SWEEP_FILE) as file:
                    file.write((json.dumps(table.to_json(), indent=2) + "\n").encode())
            state = RunState.SUCCEEDED if table.done == table.runs else RunState.FAILED
        finally:
            if plan.runs[0].folder.config.exists():
                group.finish(plan.runs[0].folder.read_config().name, *_outcome(table), state)
    return table


def _outcome(table: SweepTable) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and tags of a sweep: none but the counts before the choice."""
    numbers = {"sweep/runs": float(table.runs), "sweep/done": float(table.done)}
    if table.chosen is None:
        return numbers, {}
    spreads = {"validation": table.settings[table.chosen].validation, "lead": table.lead, **table.held_out}
    for name, spread in spreads.items():
        if spread is not None:
            ends = {"": spread.mean, "_low": spread.low, "_high": spread.high}
            numbers |= {f"final/{name}/auroc{end}": value for end, value in ends.items() if value is not None}
    return numbers, {"pneumofed.chosen": table.chosen, "pneumofed.next": table.next or ""}


def tabulate(plan: SweepPlan, failed: Mapping[tuple[str, int], str]) -> SweepTable:
    """Reads what the runs' folders hold.

    Args:
        plan: of the sweep.
        failed: why runs have failed, by setting and seed.
    """
    done = [run for run in plan.runs if run.folder.has_succeeded]
    areas = {run.key: _kept_auroc(run.folder) for run in done}
    settings = {}
    for name in dict.fromkeys(run.setting for run in plan.runs):
        own = [run for run in plan.runs if run.setting == name]
        found = {str(run.seed): areas[run.key] for run in own if math.isfinite(areas.get(run.key, math.nan))}
        settings[name] = SettingResult(
            values=own[0].values,
            validation=Spread.of(list(found.values())) if found else None,
            by_seed=found,
            failed={str(run.seed): failed[run.key] for run in own if run.key in failed},
        )
    table = SweepTable(settings=settings, runs=len(plan.runs), done=len(done))
    return _choose(table, done) if len(done) == len(plan.runs) else table


def _choose(table: SweepTable, done: Sequence[SweepRun]) -> SweepTable:
    """The best on validation of those judged on every seed, how far the next is behind, and now the held-out sets."""
    seeds = {str(run.seed) for run in done}
    whole = {name: found.by_seed for name, found in table.settings.items() if found.by_seed.keys() == seeds}
    if not whole:
        return table
    ranked = sorted(whole, key=lambda name: -float(np.mean(list(whole[name].values()))))
    summaries = [run.folder.read_summary() for run in done if run.setting == ranked[0]]
    values: dict[str, list[float]] = {}
    for summary in summaries:
        for name, results in summary.results.items():
            if (area := results["auroc"].value) is not None:
                values.setdefault(name, []).append(area)
    lead = None
    if len(ranked) > 1:
        lead = Spread.of([whole[ranked[0]][seed] - whole[ranked[1]][seed] for seed in sorted(seeds)])
    held_out = {name: Spread.of(found) for name, found in values.items()}
    return table.model_copy(update={"chosen": ranked[0], "next": ranked[1] if lead else None, "lead": lead, "held_out": held_out})


def _kept_auroc(folder: RunFolder) -> float:
    history = folder.read_history()
    return validation_auroc(history[best_round(history) - 1]) if history else math.nan


def _name_of(values: Mapping[str, Any]) -> str:
    """The name of a setting and of its folder: `strategy.name=fedexp+simulation.alpha=0.1`."""
    text = "+".join(f"{key}={value}" for key, value in values.items()) or "only"
    name = re.sub(r"[^A-Za-z0-9._=+-]", "_", text)
    if name == text and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _request(config: SweepConfig, values: Mapping[str, Any], seed: int, out: Path, workers: int | None) -> SimulationRequest:
    simulation = dict(config.simulation)
    settings: dict[str, Any] = dict(config.settings)
    for key, value in values.items():
        if key.startswith(SIMULATION_KEYS):
            simulation[key.removeprefix(SIMULATION_KEYS)] = value
        else:
            settings = merge(settings, _nested(key, value))
    phantoms = simulation.pop("phantom_patients", None)
    known = {"data", "external", "hospitals", "partition", "alpha", "sources", "held_out", "hold_out", "slow", "threads"}
    if unknown := sorted(simulation.keys() - known):
        raise ConfigError(f"simulation.{unknown[0]}: unknown key; there are {', '.join(sorted(known))} and phantom_patients")
    path = Path(config.config) if config.config else None
    return SimulationRequest(**simulation, phantoms=phantoms, config=path, settings=settings, seed=seed, out=out, workers=workers)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _check(run: SweepRun) -> None:
    """Plans the run as a new one, and compares it with what lies in its folder.

    Raises:
        ConfigError: a key or value is wrong, or the folder holds a run of other settings.
    """
    planned, folder = plan_simulation(run.request), run.folder
    if not folder.config.exists() or not folder.holds_run:
        return
    different = differing_keys(folder.read_config().model_dump(), planned.experiment.model_dump())
    different += differing_keys(read_yaml(folder.path / "simulation.yaml"), planned.simulation.model_dump())
    if different:
        raise ConfigError(
            f"{folder.path} holds a run of other settings: {'; '.join(different)}; take another --out for another study"
        )


def _begin_or_resume(run: SweepRun) -> Plan:
    begun = run.folder.last_checkpoint.exists()
    return plan_simulation(replace(run.request, resume=begun, config=None if begun else run.request.config))
