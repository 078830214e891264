"""What a simulation was asked to be, checked before anything heavy is imported: a typing error is answered at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.config import ExperimentConfig
from common.config_reader import build_config, load_experiment, merge, read_yaml
from common.config_types import Section
from common.errors import CheckpointError, ConfigError
from server.run_folder import RunFolder
from simulation.options import EngineName, PartitionKind
from simulation.superlink import Resources


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
    """Concentration of the Dirichlet draws: 0.1 is very uneven, 100 nearly even. Of `dirichlet` and `quantity` alone."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of each hospital's training; part of what makes a run repeat bit for bit."""
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """A simulation that was asked for."""

    experiment: ExperimentConfig
    simulation: SimulationConfig
    run_dir: Path
    resources: Resources
    engine: EngineName = "flower"
    resume: bool = False
    baselines: bool = False


def build_plan(
    run_dir: Path,
    experiment_values: Mapping[str, Any],
    simulation_values: Mapping[str, Any],
    *,
    config_file: Path | None = None,
    resume: bool = False,
) -> tuple[ExperimentConfig, SimulationConfig]:
    """The two configurations of a simulation. A resumed run keeps its own; only what is given on top must agree with it.

    Raises:
        ConfigError: a key or value is wrong, or the strategy needs more hospitals.
        CheckpointError: nothing to resume in `run_dir`.
    """
    run_dir = run_dir.resolve()
    simulation_values = {**simulation_values, **_absolute(simulation_values)}
    if resume:
        if not (run_dir / "simulation.yaml").exists():
            raise CheckpointError(f"{run_dir} holds no simulation to resume; check --out")
        stored = RunFolder(run_dir).read_config().model_dump()
        experiment = build_config(ExperimentConfig, merge(stored, experiment_values), "the run to resume")
        simulation = build_config(
            SimulationConfig, merge(read_yaml(run_dir / "simulation.yaml"), simulation_values), "simulation"
        )
        return experiment, simulation
    simulation = build_config(SimulationConfig, simulation_values, "simulation")
    experiment = load_experiment(config_file, merge({"strategy": {"wait_for_sites": simulation.hospitals}}, experiment_values))
    if experiment.strategy.replies_needed > simulation.hospitals:
        raise ConfigError(
            f"the strategy {experiment.strategy.name} needs {experiment.strategy.replies_needed} replies a round, "
            f"there are {simulation.hospitals} hospitals; take more hospitals or another strategy"
        )
    return experiment, simulation


def _absolute(values: Mapping[str, Any]) -> dict[str, str]:
    """Paths that hold in every folder: Flower's processes start elsewhere, and a run may be resumed from elsewhere."""
    return {key: str(Path(values[key]).resolve()) for key in ("data", "external") if values.get(key)}
