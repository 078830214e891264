"""`pneumofed check-model`: what a study's own network and loss can do and cannot, and the app bundle that hospitals approve for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pneumofed.common.ops.command_line import Json, console, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.config.experiment import ExperimentConfig


def check_model(
    model: Annotated[str, typer.Argument(help="FILE.py:FUNCTION, or a network of the list.")],
    loss: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION, a study's own loss, or one of the list.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of the study, or a name: kaggle, private, ...")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=32, max=1024, help="Side of the input in pixels.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any key of the experiment. May stand more than once.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Also write the app bundle (.fab) that hospitals read and approve.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Try what pneumofed does with a network: training, privacy, export, explanations, bytes.

    Exit code: 0 it can do what the study asks for, 2 it cannot, or it is no network.
    """
    from pneumofed.common.config.reader import load_experiment, merge, parse_overrides
    from pneumofed.simulation.network_checks import check_network, refuse_unable

    shortcuts: dict[str, Any] = {"model": {"name": model}}
    shortcuts |= {"loss": {"name": loss}} if loss else {}
    shortcuts |= {"image": {"size_px": image_size}} if image_size else {}
    experiment = load_experiment(config, merge(shortcuts, parse_overrides(set_ or [])))
    findings = check_network(experiment)
    if as_json:
        print_json([found._asdict() for found in findings])
    else:
        _show([(found.answer, found.name, found.text) for found in findings])
    refuse_unable(findings)
    if bundle:
        _write_bundle(bundle, experiment)


def _show(rows: list[tuple[str, str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _write_bundle(path: Path, experiment: ExperimentConfig) -> None:
    from pneumofed.common.errors import ConfigError
    from pneumofed.common.files import write_file
    from pneumofed.common.ops.app_bundle import build_bundle, hash_bundle
    from pneumofed.common.ops.study_code import study_codes_of

    content = build_bundle(study_codes_of(experiment))
    try:
        write_file(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    say(f"{path}: the app with the study's own code, SHA-256 {hash_bundle(content)}")
    say(
        f"a hospital reads it (unzip -p {path} 'pneumofed/study_code/*') and lets it run by `pneumofed site approve --bundle {path}`"
    )
