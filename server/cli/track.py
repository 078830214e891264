"""`pneumofed track`, and the option `--track` of the commands that start a run. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pneumofed.common.ops.command_line import note, say

Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TARGET",
        help="Where the run is tracked beside its folder: tensorboard, tensorboard:FOLDER, mlflow:ADDRESS or mlflow "
        "(MLFLOW_TRACKING_URI). May repeat.",
    ),
]


def track_command(
    run: Annotated[Path, typer.Argument(help="Run folder, of a run that goes on or is over.")],
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="tensorboard, tensorboard:FOLDER, mlflow:ADDRESS or mlflow (MLFLOW_TRACKING_URI). May repeat.",
            show_default="where the run is tracked already",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over.")] = False,
) -> None:
    """Send what a run folder holds to TensorBoard or MLflow; what is there already is not sent again."""
    from pneumofed.common.ops.command_line import FAILURE, exit_when_stopped
    from pneumofed.server.runs.folder import RunFolder
    from pneumofed.server.tracking.process import follow_to_end, send_all
    from pneumofed.server.tracking.targets import Tracking, read_targets

    folder, tracking = RunFolder(run), Tracking(read_targets(to))
    if not follow:
        say(f"tracked at {', '.join(str(target) for target in send_all(folder, tracking))}")
        return
    with exit_when_stopped(lambda: f"pneumofed: stopped; `pneumofed track {run}` sends what is missing"):
        over = follow_to_end(folder, tracking)
    if not over:
        note(f"{run} shows no sign of life and is no longer followed; `pneumofed track {run} --follow` begins again")
        raise typer.Exit(FAILURE)
