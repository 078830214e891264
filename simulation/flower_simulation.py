"""The command `flower-simulation`, which Flower no longer ships, with its options, over Flower's supported commands.

    flower-simulation --app . --num-supernodes 10 --run-config "rounds=3 strategy.name='fedprox' data='/path/chest_xray'"

For pneumofed's own app the run config may hold any key of the experiment and of the simulation; the virtual hospitals are laid out
first. Any other Flower app runs with its own run config, unchanged.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pneumofed.common.config.reader import set_by_path
from pneumofed.common.errors import ConfigError, PneumofedError
from pneumofed.common.ops.command_line import take_stop_signals

logger = logging.getLogger(__name__)

CLIENT_RESOURCES = {"num_cpus": "client_cpus", "num_gpus": "client_gpus"}
INIT_ARGS = {"num_cpus": "cpus", "num_gpus": "gpus", "address": "ray_address"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code: 0 only if the run succeeded."""
    options = _parser().parse_args(arguments)
    take_stop_signals()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run_app_over_nodes(
            Path(options.app), options.num_supernodes, options.run_config or [], options.backend_config, options.verbose
        )
    except PneumofedError as error:
        logger.error("flower-simulation: %s", error)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        logger.error("flower-simulation: stopped")
        return 130
    return 0


def run_app_over_nodes(app: Path, nodes: int, run_config: Sequence[str], backend_config: str, verbose: bool) -> None:
    """Runs a Flower app over virtual nodes, and waits for its end.

    Args:
        app: folder of the app, with its pyproject.toml.
        nodes: how many; at least 1. Of pneumofed's own app they are the hospitals.
        run_config: texts of `key=value` pairs, or the path of one TOML file.
        backend_config: JSON, see `read_resources`.
        verbose: whether Flower writes its debug log.

    Raises:
        ConfigError: the app or an option is wrong.
        PneumofedError: the run failed.
    """
    project = read_project(app)
    resources = read_resources(nodes, backend_config, verbose)
    values = parse_run_config(run_config)
    if project["project"]["name"] == "pneumofed":
        _run_own(values, resources)
    else:
        _run_other(app.resolve(), values, resources)


def read_project(app: Path) -> dict[str, Any]:
    """Reads the project file of the Flower app in the folder `app`.

    Raises:
        ConfigError: there is none, or it is of no Flower app.
    """
    path = app / "pyproject.toml"
    if not path.is_file():
        raise ConfigError(f"--app {app}: expected the folder of a Flower app, found no pyproject.toml there")
    project = tomllib.loads(path.read_text(encoding="utf-8"))
    if "app" not in project.get("tool", {}).get("flwr", {}):
        raise ConfigError(f"--app {app}: its pyproject.toml has no [tool.flwr.app] section, so it is no Flower app")
    return project


def parse_run_config(texts: Sequence[str]) -> dict[str, Any]:
    """Parses flat keys and TOML values of `key=value key='text'` pairs, or of one TOML file.

    Raises:
        ConfigError: a text is neither.
    """
    from flwr.common.config import parse_config_args

    try:
        values: dict[str, Any] = parse_config_args(list(texts))
    except Exception as error:  # Flower raises click's, tomli's and built-in exceptions here
        raise ConfigError(f"--run-config: {error}; expected e.g. \"rounds=3 strategy.name='fedprox'\" or a TOML file") from None
    return values


def read_resources(nodes: int, backend_config: str, verbose: bool) -> Any:
    """Reads what each node and Ray may use of the machine.

    Args:
        nodes: number of virtual nodes; at least 1.
        backend_config: JSON object as `--backend-config` takes it, e.g. '{"client_resources": {"num_cpus": 1}}'; what it leaves out is as
            in `Resources`.
        verbose: whether Flower writes its debug log.

    Returns:
        `simulation.superlink.Resources`.

    Raises:
        ConfigError: no JSON object, or a key that is not supported.
    """
    from pneumofed.simulation.superlink import Resources

    if nodes < 1:
        raise ConfigError(f"--num-supernodes: expected at least 1, got {nodes}")
    try:
        config = json.loads(backend_config)
    except ValueError as error:
        raise ConfigError(f"--backend-config: expected JSON, got {backend_config!r} ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--backend-config: expected a JSON object, got {backend_config!r}")
    values: dict[str, Any] = {}
    for section, names in (("client_resources", CLIENT_RESOURCES), ("init_args", INIT_ARGS)):
        values |= _rename(config.pop(section, {}), names, section)
    if config:
        raise ConfigError(f"--backend-config: unknown keys {sorted(config)}; known are client_resources and init_args")
    return Resources(nodes=nodes, verbose=verbose, **values)


def _rename(given: Mapping[str, Any], names: Mapping[str, str], section: str) -> dict[str, Any]:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ConfigError(f"--backend-config: {section} has no {unknown}; known are {sorted(names)}")
    return {names[key]: value for key, value in given.items()}


def _run_own(values: Mapping[str, Any], resources: Any) -> None:
    from pneumofed.simulation.hospitals.sources import SimulationConfig
    from pneumofed.simulation.hospitals.study import count_hospitals
    from pneumofed.simulation.plan import Plan, build_plan, default_run_dir
    from pneumofed.simulation.runner import run_simulation

    experiment: dict[str, Any] = {}
    simulation: dict[str, Any] = {"hospitals": resources.nodes}
    known = set(SimulationConfig.model_fields) - set(simulation)
    settings = dict(values)
    out, config, resume = settings.pop("out", None), settings.pop("config", None), bool(settings.pop("resume", False))
    for key, value in settings.items():
        target = simulation if key.partition(".")[0] in known else experiment
        set_by_path(target, key, value)
    simulation["hospitals"] = max(
        1, resources.nodes - sum(SimulationConfig(sources=simulation.get("sources") or {}).groups.values())
    )
    run_dir = Path(out) if out else default_run_dir(resume)
    built = build_plan(run_dir, experiment, simulation, config_file=Path(config) if config else None, resume=resume)
    if (hospitals := count_hospitals(built[1])) != resources.nodes:
        raise ConfigError(f"--num-supernodes: {resources.nodes} asked for, but the sources make {hospitals} hospitals")
    summary = run_simulation(Plan(*built, run_dir=run_dir, resources=resources, resume=resume), logger.info)
    report = run_dir / "report.html"
    logger.info("%s; report: %s", summary.status, report if report.exists() else "could not be written")


def _run_other(app: Path, values: Mapping[str, Any], resources: Any) -> None:
    import tempfile

    from pneumofed.simulation.superlink import private_superlink, run_app

    resources.check()
    environment = {"RAY_ADDRESS": resources.ray_address} if resources.ray_address else {}
    with tempfile.TemporaryDirectory() as folder, private_superlink(Path(folder) / "superlink.log", environment) as superlink:
        run_app(superlink, app, values, resources, None, lambda: None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flower-simulation", description="Run a Flower app over virtual nodes on this machine.")
    parser.add_argument("--app", default=".", help="folder of the Flower app (default: .)")
    parser.add_argument("--num-supernodes", type=int, required=True, help="number of virtual nodes")
    parser.add_argument(
        "--run-config", action="append", help="\"key=value key='text'\", or the path of a TOML file; may stand more than once"
    )
    parser.add_argument(
        "--backend-config",
        default='{"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}',
        help='JSON: {"client_resources": {"num_cpus", "num_gpus"}, "init_args": {"num_cpus", "num_gpus", "address"}}',
    )
    parser.add_argument("--verbose", action="store_true", help="show Flower's debug log")
    return parser


if __name__ == "__main__":
    sys.exit(main())
