"""Help says what a value is when it is not given, in words that the terminal really shows."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
import typer.main
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.simulation.hospitals.sources import SimulationConfig


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))
    else:
        yield path, command


COMMANDS = dict(_commands(typer.main.get_command(app)))
PATHS = [" ".join(path) for path in COMMANDS]


def _help(path: str) -> str:
    shown = CliRunner().invoke(app, [*path.split(), "--help"], terminal_width=10_000, env={"COLUMNS": "10000"}).output
    return re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize("path", PATHS)
def test_help_shows_every_default_and_loses_no_word_to_markup(path: str) -> None:
    shown = _help(path)
    for parameter in COMMANDS[tuple(path.split())].params:
        told = getattr(parameter, "help", None) or ""
        assert re.sub(r"\s+", " ", told) in shown, f"{parameter.name}: a part of its help is not shown"
        default = getattr(parameter, "show_default", None)
        if isinstance(default, str):
            assert f"[default: ({default})]" in shown, parameter.name


def test_the_defaults_of_simulate_are_those_of_the_configuration() -> None:
    experiment, simulation = ExperimentConfig(), SimulationConfig()
    expected = {
        "hospitals": simulation.hospitals,
        "partition": simulation.partition,
        "alpha": simulation.alpha,
        "phantoms": simulation.phantom_patients,
        "threads": simulation.threads,
        "strategy": experiment.strategy.name,
        "rounds": experiment.rounds,
        "image_size": experiment.image.size_px,
        "seed": experiment.seed,
    }
    told = {parameter.name: getattr(parameter, "show_default", None) for parameter in COMMANDS["simulate",].params}
    assert {name: told[name] for name in expected} == {name: str(value) for name, value in expected.items()}
