"""What may be asked of a simulation, and where runs lie when nobody says: `runs/<date>-<time>`, for `--resume` the newest."""

from __future__ import annotations

from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Literal

from common.errors import CheckpointError

EngineName = Literal["flower", "local"]
PartitionKind = Literal["iid", "dirichlet", "quantity", "scanner"]
PhantomFormat = Literal["jpeg", "dicom"]
PretrainSource = Literal["phantoms", "random-processes"]

RUNS = Path("runs")


def default_run_dir(resume: bool) -> Path:
    """A new folder below `runs/`, or with `resume` the one that was changed last.

    Raises:
        CheckpointError: there is no run to resume.
    """
    if not resume:
        stamp = RUNS / datetime.now().strftime("%Y%m%d-%H%M%S")
        later = (stamp.with_name(f"{stamp.name}-{number}") for number in count(2))  # for two runs within one second
        return next(folder for folder in chain([stamp], later) if not folder.exists())
    runs = sorted(RUNS.glob("*/simulation.yaml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise CheckpointError(f"--resume: no run below {RUNS.resolve()}; name its folder with --out")
    return runs[-1].parent
