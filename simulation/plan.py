"""Plans of simulations: what may be asked of one (`SimulationRequest`, `SimulationConfig`), checked before anything heavy is imported.

So a typing error is answered at once. Runs lie in `runs/<date>-<time>` where no folder is named; `--resume` goes on with the newest.
`demo_request` is what `pneumofed demo` runs: small enough for minutes on two CPU cores, and every part of the way in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, get_args

from pneumofed.common.config.choices import StrategyName
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import SIMULATION_SECTION, build_config, find_config, load_experiment, merge, read_yaml
from pneumofed.common.errors import CheckpointError, ConfigError
from pneumofed.common.ops.study_code import describe_name, find_study_code, is_study_code, with_study_code
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.resume import check_resumable, describe_way_on
from pneumofed.server.tracking.targets import Tracking, TrackingTarget
from pneumofed.simulation.hospitals.sources import COLUMN, SimulationConfig
from pneumofed.simulation.superlink import Resources, count_gpus

EngineName = Literal["flower", "local"]
PhantomFormat = Literal["jpeg", "dicom"]
VolumeFormat = Literal["dicom", "nifti"]
PretrainSource = Literal["phantoms", "random-processes"]
RUNS_FOLDER = Path("runs")
SOURCES = ("sources", "held_out")


@dataclass(frozen=True)
class Plan:
    """A simulation, checked and ready to run.

    Attributes:
        experiment: the federation's recipe, with every default.
        simulation: the virtual hospitals.
        run_dir: run folder.
        resources: what it may use of the machine.
        engine: Flower's simulation on Ray, or processes of our own on this machine.
        resume: whether to go on with the run in `run_dir`.
        baselines: whether to train on pooled images and in each hospital too.
        workers: how many hospitals work at once in the local engine, with 1 in this process; and how many baselines are trained at once.
        tracking: where the run is tracked; a resumed one also where it was before.
    """

    experiment: ExperimentConfig
    simulation: SimulationConfig
    run_dir: Path
    resources: Resources
    engine: EngineName = "flower"
    resume: bool = False
    baselines: bool = False
    workers: int = 1
    tracking: Tracking = field(default_factory=Tracking)


@dataclass(frozen=True)
class SimulationRequest:
    """A simulation as a user asks for it, on the command line or in Python; None leaves a value to the configuration and its defaults.

    Attributes:
        data, external, hospitals, partition, alpha, sources, held_out, hold_out, slow, threads: as in `SimulationConfig`.
        phantoms: `phantom_patients` of `SimulationConfig`.
        model, loss: short for `model.name` and `loss.name`: of the list, or a study's own, `FILE.py:FUNCTION`.
        strategy, rounds, image_size, seed: short for `strategy.name`, `rounds`, `image.size_px` and `seed` of the experiment.
        settings: other keys of the experiment, nested; they win over all else.
        config: YAML file with what differs from the defaults.
        init: model bundle that the run goes on from.
        trusted: public keys of coordinators whose bundle is taken; empty: any.
        out: run folder; None: a new one, or with `resume` the newest.
        resume: whether to go on with the run in `out`.
        baselines: whether to train on pooled images and in each hospital too.
        engine: Flower's simulation on Ray, or processes of our own on this machine; None: Flower's where a share of a GPU or a
            cluster is asked for.
        workers: of the local engine: how many hospitals work at once, with 1 in this process; None: as many as there are CPUs for,
            and 1 on a machine with a GPU.
        gpus: share of a GPU for each hospital, of Flower's engine.
        ray_address: of a running Ray cluster, of Flower's engine.
        track: where the run is tracked.
    """

    data: str | Path | None = None
    external: str | Path | None = None
    hospitals: int | None = None
    partition: str | None = None
    alpha: float | None = None
    sources: Mapping[str, str | Path] = field(default_factory=dict)
    held_out: Mapping[str, str | Path] = field(default_factory=dict)
    hold_out: Mapping[str, float | str] = field(default_factory=dict)
    slow: Mapping[str, float | str] = field(default_factory=dict)
    phantoms: int | None = None
    model: str | None = None
    loss: str | None = None
    strategy: StrategyName | None = None
    rounds: int | None = None
    image_size: int | None = None
    seed: int | None = None
    baselines: bool = False
    resume: bool = False
    init: Path | None = None
    trusted: Sequence[Path] = ()
    out: Path | None = None
    config: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineName | None = None
    workers: int | None = None
    threads: int | None = None
    gpus: float = 0.0
    ray_address: str | None = None
    track: Sequence[TrackingTarget] = ()

    def chosen_engine(self) -> EngineName:
        """Returns the engine that the request asks for, by name or by what only one of them has.

        Raises:
            ConfigError: it names another one, or asks for what its engine does not have.
        """
        flower = self.gpus > 0 or self.ray_address is not None
        engine = self.engine or ("flower" if flower else "local")
        if engine not in get_args(EngineName):
            raise ConfigError(f"engine: expected {' or '.join(get_args(EngineName))}, got {engine!r}")
        if engine == "local" and flower:
            raise ConfigError(
                "engine: shares of a GPU and Ray clusters are of Flower's engine; leave out engine or set it to flower"
            )
        if engine == "flower" and self.workers is not None:
            raise ConfigError(
                "workers: they are of the local engine; Flower's runs as many hospitals at once as Ray has CPUs for"
            )
        return engine

    def experiment_values(self) -> dict[str, Any]:
        """Returns what the request changes in the experiment, nested."""
        shortcuts = _given(
            model=_given(name=self.model) or None,
            loss=_given(name=self.loss) or None,
            strategy=_given(name=self.strategy) or None,
            image=_given(size_px=self.image_size) or None,
            rounds=self.rounds,
            seed=self.seed,
        )
        return with_study_code(merge(shortcuts, self.settings))

    def simulation_values(self) -> dict[str, Any]:
        """Returns what the request changes in the virtual hospitals.

        Raises:
            ConfigError: both a data folder and a number of phantoms are given, or a number of hospitals beside a column of them.
        """
        if self.data is not None and self.phantoms is not None:
            raise ConfigError("phantoms: phantoms are drawn only where no data folder is given; leave out data or phantoms")
        if self.partition is not None and self.partition.startswith(COLUMN) and self.hospitals is not None:
            raise ConfigError("hospitals: their number follows from the column; leave out hospitals or the column")
        return _given(
            data=None if self.data is None else str(self.data),
            external=None if self.external is None else str(self.external),
            hospitals=self.hospitals,
            partition=self.partition,
            alpha=self.alpha,
            phantom_patients=self.phantoms,
            threads=self.threads,
            sources=_places(self.sources),
            held_out=_places(self.held_out),
            hold_out=dict(self.hold_out) or None,
            slow=_factors(self.slow) or None,
        )


def _factors(slow: Mapping[str, float | str]) -> dict[str, float]:
    try:
        return {name: float(factor) for name, factor in slow.items()}
    except ValueError:
        raise ConfigError(f"slow: expected numbers, such as hospital-03=10, got {dict(slow)}") from None


def plan_simulation(request: SimulationRequest) -> Plan:
    """Makes the plan of `request`, for `simulation.runner.run_simulation`; nothing is written yet.

    Raises:
        ConfigError: a key or value is wrong, or the bundle to start from does not fit.
        DataError: the data folder is not in the Kaggle layout.
        BundleError: the bundle to start from cannot be opened.
        CheckpointError: there is nothing to resume.
    """
    engine = request.chosen_engine()
    if engine == "flower":  # a GPU or a cluster that is not there is told before anything heavy is loaded
        Resources(1, request.threads or 1, request.gpus, ray_address=request.ray_address).check()
    run_dir = request.out or default_run_dir(request.resume)
    experiment_values, simulation_values = request.experiment_values(), request.simulation_values()
    bundle = None
    if request.init:
        from pneumofed.common.model_bundle.bundle import open_trusted, start_values

        bundle = open_trusted(request.init, request.trusted)
        experiment_values = merge(start_values(bundle, request.init), experiment_values)
    experiment, simulation = build_plan(
        run_dir, experiment_values, simulation_values, config_file=request.config, resume=request.resume
    )
    if bundle:
        from pneumofed.common.model_bundle.bundle import check_start

        check_start(experiment, bundle)
    from pneumofed.simulation.hospitals.study import count_hospitals  # SciPy and what reads images, once all else is right

    resources = Resources(count_hospitals(simulation), simulation.threads, request.gpus, ray_address=request.ray_address)
    workers = request.workers or (1 if count_gpus() else min(resources.nodes, (os.cpu_count() or 1) // simulation.threads))
    tracking = Tracking(tuple(request.track))
    return Plan(experiment, simulation, run_dir, resources, engine, request.resume, request.baselines, max(workers, 1), tracking)


def build_plan(
    run_dir: Path,
    experiment_values: Mapping[str, Any],
    simulation_values: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    resume: bool = False,
) -> tuple[ExperimentConfig, SimulationConfig]:
    """Builds the two configurations of a simulation. A resumed run keeps its own; only what is given on top must agree with it.

    Args:
        run_dir: run folder; nothing is read from it unless `resume` is set.
        experiment_values: nested keys of the experiment; they win over `config_file`.
        simulation_values: keys of `SimulationConfig`; relative paths are of the current folder.
        config_file: YAML file of the experiment; None: the defaults. Not read with `resume`.
        resume: whether the run in `run_dir` goes on.

    Raises:
        ConfigError: a key or value is wrong, or the strategy needs more hospitals.
        CheckpointError: nothing to resume in `run_dir`, or a run with other settings.
    """
    run_dir = run_dir.resolve()
    simulation_values = _absolute(simulation_values)
    if resume:
        if not (run_dir / "simulation.yaml").exists():
            raise CheckpointError(f"{run_dir} holds no simulation to resume; check --out")
        folder = RunFolder(run_dir)
        if not folder.config.exists():  # ended while its hospitals were laid out
            raise CheckpointError(f"{run_dir} cannot be resumed: {describe_way_on(folder)}")
        stored = folder.read_config()
        folder.remember_study_code(stored)
        _check_study_unchanged(run_dir, stored.model_dump(), experiment_values)
        experiment = build_config(ExperimentConfig, merge(stored.model_dump(), experiment_values), "the run to resume")
        simulation = build_config(
            SimulationConfig, merge(read_yaml(run_dir / "simulation.yaml"), simulation_values), "simulation"
        )
        check_resumable(folder, experiment)
        return experiment, simulation
    simulation = _read_simulation(config_file, simulation_values)
    from pneumofed.simulation.hospitals.study import count_hospitals

    hospitals = count_hospitals(simulation)
    values = merge({"strategy": {"wait_for_sites": hospitals}}, experiment_values)
    experiment = load_experiment(config_file, values)
    _check_hospitals(experiment, simulation, hospitals)
    return experiment, simulation


def _check_hospitals(experiment: ExperimentConfig, simulation: SimulationConfig, hospitals: int) -> None:
    """Refuses a strategy that these hospitals do not do for."""
    if experiment.strategy.replies_needed > hospitals:
        raise ConfigError(
            f"the strategy {experiment.strategy.name} needs {experiment.strategy.replies_needed} replies a round, "
            f"there are {hospitals} hospitals; take more hospitals or another strategy"
        )
    if simulation.slow and experiment.strategy.enough_sites is not None:
        raise ConfigError(
            "slow: strategy.enough_sites closes rounds as real replies come, which a virtual clock does not know; take strategy.buffer"
        )


def _check_study_unchanged(run_dir: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Names the file of a study's own network or loss that was changed since the run began."""
    for section in ("model", "loss"):
        before, now = stored[section]["name"], given.get(section, {}).get("name", stored[section]["name"])
        if before != now and is_study_code(before) and is_study_code(now):
            raise CheckpointError(
                f"{find_study_code(now)} is not the code that the run in {run_dir} was started with: {describe_name(now)} now, "
                f"{describe_name(before)} then; leave out --{section} to go on with the run's own copy, or start a new run"
            )


def _read_simulation(config_file: Path | None, values: Mapping[str, Any]) -> SimulationConfig:
    """The `simulation` section of the configuration file with `values` over it, its sources there."""
    from pneumofed.simulation.hospitals.sources import check_places

    written = read_yaml(find_config(config_file)).get(SIMULATION_SECTION) or {} if config_file else {}
    section = f"{config_file}: {SIMULATION_SECTION}"
    if not isinstance(written, dict):
        raise ConfigError(f"{section}: expected keys and values, got {type(written).__name__}")
    simulation = build_config(SimulationConfig, _absolute(merge(written, values)), section if written else "simulation")
    check_places(simulation)
    return simulation


def demo_request(out: Path) -> SimulationRequest:
    """Returns the request of the demo, with the run folder `out`."""
    return SimulationRequest(
        hospitals=3,
        partition="dirichlet",
        alpha=1.0,
        phantoms=180,
        rounds=8,
        image_size=64,
        strategy="fedavg",
        settings={"name": "demo", "strategy": {"wait_for_sites": 3}, "training": {"batch_size": 16, "local_epochs": 2}},
        baselines=True,
        out=out,
    )


def default_run_dir(resume: bool) -> Path:
    """Returns a new folder below `runs/`, or with `resume` the one that was changed last of those with a completed round.

    Raises:
        CheckpointError: there is no such run.
    """
    if not resume:
        stamp = RUNS_FOLDER / datetime.now().strftime("%Y%m%d-%H%M%S")
        later = (stamp.with_name(f"{stamp.name}-{number}") for number in count(2))  # for two runs within one second
        return next(folder for folder in chain([stamp], later) if not folder.exists())
    begun = [path for path in RUNS_FOLDER.glob("*/simulation.yaml") if RunFolder(path.parent).last_checkpoint.exists()]
    if not begun:
        raise CheckpointError(f"--resume: no run below {RUNS_FOLDER.resolve()} has completed a round; name its folder with --out")
    return max(begun, key=lambda path: path.stat().st_mtime).parent


def _absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Paths that hold in every folder: Flower's processes start elsewhere, and a run may be resumed from elsewhere."""
    single = {key: str(Path(values[key]).resolve()) for key in ("data", "external") if values.get(key)}
    many = {
        key: _places({name: Path(place).resolve() for name, place in values[key].items()}) for key in SOURCES if values.get(key)
    }
    return {**values, **single, **many}


def _places(sources: Mapping[str, str | Path]) -> dict[str, str] | None:
    return {name: str(place) for name, place in sources.items()} or None


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
