"""The ServerApp: what Flower starts at the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, experiment_from_json, load_experiment, read_yaml
from pneumofed.common.errors import ConfigError, PrintableFormatter
from pneumofed.common.wire.messages import COORDINATOR_KEY, EXPERIMENT_KEY, tune_parts
from pneumofed.server.federation.run import run_federation
from pneumofed.server.federation.survey import run_survey

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Starts the run, or the survey, that the run config names. Its report is written by whoever closes the run: it is no part of the app.

    Args:
        grid: Flower's way to the connected nodes.
        context: its run config names the coordinator file (`coordinator`) and the experiment (`experiment`).

    Raises:
        ConfigError: the run config names no coordinator file, or a file that it names is wrong.
    """
    _show_log()
    tune_parts()
    settings = read_coordinator(context.run_config)
    if settings.survey is not None:
        run_survey(grid, experiment_of(context.run_config), settings)
    else:
        run_federation(grid, experiment_of(context.run_config), settings)


def _show_log() -> None:
    """Our own log on standard error; the root logger would also show each HTTP request of Flower."""
    logger = logging.getLogger("pneumofed.server")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(message)s"))
        logger.addHandler(handler)


def experiment_of(run_config: Mapping[str, Any]) -> ExperimentConfig:
    """Reads the experiment that the run config names; the defaults where it names none."""
    value = str(run_config.get(EXPERIMENT_KEY, ""))
    return experiment_from_json(value) if value.lstrip().startswith("{") else load_experiment(value or None)


def read_coordinator(run_config: Mapping[str, Any]) -> CoordinatorConfig:
    """Reads the coordinator's settings from the file that the run config names.

    Raises:
        ConfigError: the run config names no file.
    """
    path = str(run_config.get(COORDINATOR_KEY, ""))
    if not path:
        raise ConfigError(
            "the run config names no coordinator file: start the run with `pneumofed simulate` or `flower-simulation`, "
            "or give --run-config 'coordinator=\"/path/coordinator.yaml\"'"
        )
    return build_config(CoordinatorConfig, read_yaml(Path(path)), path)
