"""Runs the plain Flower app with `flwr run` on a SuperLink that simulates: `python -m benchmarks.peers.flower_run WORK TURN`.

The SuperLink is private and ends with the run, as in pneumofed's own simulation: the detached one of `flwr run` never stops.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.peers.work import WORK_FILE, Work
from pneumofed.simulation.superlink import Resources, private_superlink, run_app

PROJECT = """\
[project]
name = "peers"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "peers"

[tool.flwr.app.components]
serverapp = "peers_app:server_app"
clientapp = "peers_app:client_app"

[tool.flwr.app.config]
work = ""
turn = ""
"""


def run(work: Work, turn: Path) -> None:
    """Submits the app and waits for its end.

    Args:
        work: what is done.
        turn: folder for the app, the log and the result.
    """
    app = turn / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    shutil.copy(Path(__file__).with_name("flower_app.py"), app / "peers_app.py")
    log, places = turn / "flower.log", {"work": str(work.folder), "turn": str(turn)}
    resources = Resources(len(work.hospitals), client_cpus=1, cpus=work.recipe.parallel)
    with private_superlink(log, {}) as superlink, log.open("ab") as output:
        run_app(superlink, app, places, resources, output, lambda: None)


if __name__ == "__main__":
    folder, turn = (Path(value).resolve() for value in sys.argv[1:3])
    if not (folder / WORK_FILE).is_file():
        raise SystemExit(f"{folder} holds no work")
    run(Work.read(folder), turn)
