"""Plans of simulations: what may be asked of one (`SimulationRequest`, `SimulationConfig`), checked before anything heavy is imported.

So a typing error is answered at once. Runs lie in `runs/<date>-<time>` where no folder is named; `--resume` goes on with the newest.
`demo_request` is what `pneumofed demo` runs: small enough for minutes on two CPU cores, and every part of the way in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pneumofed.common.config.experiment import ExperimentConfig, Section, StrategyName
from pneumofed.common.config.reader import build_config, load_experiment, merge, read_yaml
from pneumofed.common.errors import CheckpointError, ConfigError
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.resume import check_resumable, describe_way_on
from pneumofed.simulation.superlink import Resources

EngineName = Literal["flower", "local"]
PartitionKind = Literal["iid", "dirichlet", "quantity", "scanner"]
PhantomFormat = Literal["jpeg", "dicom"]
PretrainSource = Literal["phantoms", "random-processes"]
RUNS_FOLDER = Path("runs")


class SimulationConfig(Section):
    """What makes the virtual hospitals: the data, how it is dealt out, and what each hospital may use of the machine."""

    data: str | None = None
    """Folder in the Kaggle layout: train/ (and val/) is dealt to the hospitals, test/ is the coordinator's. Unset, phantoms are drawn
    into the run folder, and their external set is used."""
    phantom_patients: Annotated[int, Field(ge=3, le=100_000)] = 240
    """Training patients of the phantom set."""
    external: str | None = None
    """Folder with a labels.csv (or the CSV itself): the held-out external set."""
    hospitals: Annotated[int, Field(ge=1, le=10_000)] = 5
    partition: PartitionKind = "dirichlet"
    alpha: Annotated[float, Field(gt=0.0)] = 0.5
    """Concentration of the Dirichlet draws: 0.1 is very uneven, 100 nearly even. Only of `dirichlet` and `quantity`."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of each hospital's training; part of what makes a run repeat bit for bit."""
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """A simulation, checked and ready to run.

    Attributes:
        experiment: the federation's recipe, with every default.
        simulation: the virtual hospitals.
        run_dir: run folder.
        resources: what it may use of the machine.
        engine: Flower's simulation on Ray, or one hospital after the other in this process.
        resume: whether to go on with the run in `run_dir`.
        baselines: whether to train on pooled images and in each hospital too.
    """

    experiment: ExperimentConfig
    simulation: SimulationConfig
    run_dir: Path
    resources: Resources
    engine: EngineName = "flower"
    resume: bool = False
    baselines: bool = False


@dataclass(frozen=True)
class SimulationRequest:
    """A simulation as a user asks for it, on the command line or in Python; None leaves a value to the configuration and its defaults.

    Attributes:
        data, external, hospitals, partition, alpha, threads: as in `SimulationConfig`.
        phantoms: `phantom_patients` of `SimulationConfig`.
        strategy, rounds, image_size, seed: short for `strategy.name`, `rounds`, `image.size_px` and `seed` of the experiment.
        settings: other keys of the experiment, nested; they win over all else.
        config: YAML file with what differs from the defaults.
        init: model bundle that the run goes on from.
        trusted: public keys of coordinators whose bundle is taken; empty: any.
        out: run folder; None: a new one, or with `resume` the newest.
        resume: whether to go on with the run in `out`.
        baselines: whether to train on pooled images and in each hospital too.
        engine: Flower's simulation on Ray, or one hospital after the other in this process.
        gpus: share of a GPU for each hospital.
        ray_address: of a running Ray cluster.
    """

    data: str | Path | None = None
    external: str | Path | None = None
    hospitals: int | None = None
    partition: PartitionKind | None = None
    alpha: float | None = None
    phantoms: int | None = None
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
    engine: EngineName = "flower"
    threads: int | None = None
    gpus: float = 0.0
    ray_address: str | None = None

    def experiment_values(self) -> dict[str, Any]:
        """Returns what the request changes in the experiment, nested."""
        shortcuts = _given(
            strategy=_given(name=self.strategy) or None,
            image=_given(size_px=self.image_size) or None,
            rounds=self.rounds,
            seed=self.seed,
        )
        return merge(shortcuts, self.settings)

    def simulation_values(self) -> dict[str, Any]:
        """Returns what the request changes in the virtual hospitals.

        Raises:
            ConfigError: both a data folder and a number of phantoms are given.
        """
        if self.data is not None and self.phantoms is not None:
            raise ConfigError("phantoms: phantoms are drawn only where no data folder is given; leave out data or phantoms")
        return _given(
            data=None if self.data is None else str(self.data),
            external=None if self.external is None else str(self.external),
            hospitals=self.hospitals,
            partition=self.partition,
            alpha=self.alpha,
            phantom_patients=self.phantoms,
            threads=self.threads,
        )


def plan_simulation(request: SimulationRequest) -> Plan:
    """Makes the plan of `request`, for `simulation.runner.run_simulation`; nothing is written yet.

    Raises:
        ConfigError: a key or value is wrong, or the bundle to start from does not fit.
        BundleError: the bundle to start from cannot be opened.
        CheckpointError: there is nothing to resume.
    """
    if request.engine not in get_args(EngineName):
        raise ConfigError(f"engine: expected {' or '.join(get_args(EngineName))}, got {request.engine!r}")
    run_dir, experiment_values = request.out or default_run_dir(request.resume), request.experiment_values()
    bundle = None
    if request.init:
        from pneumofed.common.model_bundle.bundle import open_start, start_values

        bundle = open_start(request.init, request.trusted)
        experiment_values = merge(start_values(bundle, request.init), experiment_values)
    experiment, simulation = build_plan(
        run_dir, experiment_values, request.simulation_values(), config_file=request.config, resume=request.resume
    )
    if bundle:
        from pneumofed.common.model_bundle.bundle import check_start

        check_start(experiment, bundle)
    resources = Resources(simulation.hospitals, simulation.threads, request.gpus, ray_address=request.ray_address)
    return Plan(experiment, simulation, run_dir, resources, request.engine, request.resume, request.baselines)


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
    simulation_values = {**simulation_values, **_absolute(simulation_values)}
    if resume:
        if not (run_dir / "simulation.yaml").exists():
            raise CheckpointError(f"{run_dir} holds no simulation to resume; check --out")
        folder = RunFolder(run_dir)
        if not folder.config.exists():  # ended while its hospitals were laid out
            raise CheckpointError(f"{run_dir} cannot be resumed: {describe_way_on(folder)}")
        stored = folder.read_config().model_dump()
        experiment = build_config(ExperimentConfig, merge(stored, experiment_values), "the run to resume")
        simulation = build_config(
            SimulationConfig, merge(read_yaml(run_dir / "simulation.yaml"), simulation_values), "simulation"
        )
        check_resumable(folder, experiment)
        return experiment, simulation
    simulation = build_config(SimulationConfig, simulation_values, "simulation")
    experiment = load_experiment(config_file, merge({"strategy": {"wait_for_sites": simulation.hospitals}}, experiment_values))
    if experiment.strategy.replies_needed > simulation.hospitals:
        raise ConfigError(
            f"the strategy {experiment.strategy.name} needs {experiment.strategy.replies_needed} replies a round, "
            f"there are {simulation.hospitals} hospitals; take more hospitals or another strategy"
        )
    return experiment, simulation


def demo_request(out: Path) -> SimulationRequest:
    """Returns the request of the demo, with the run folder `out`."""
    return SimulationRequest(
        hospitals=3,
        partition="dirichlet",
        alpha=1.0,
        phantoms=180,
        rounds=12,
        image_size=64,
        strategy="fedavg",
        settings={"name": "demo", "strategy": {"wait_for_sites": 3}, "training": {"batch_size": 16, "local_epochs": 1}},
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


def _absolute(values: Mapping[str, Any]) -> dict[str, str]:
    """Paths that hold in every folder: Flower's processes start elsewhere, and a run may be resumed from elsewhere."""
    return {key: str(Path(values[key]).resolve()) for key in ("data", "external") if values.get(key)}


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
