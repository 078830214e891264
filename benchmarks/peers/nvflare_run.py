"""Runs the work on NVFlare's simulator: `PYTHON -m benchmarks.peers.nvflare_run WORK TURN THREADS`, with a Python that has
NVFlare.

`FedAvgRecipe` and `SimEnv` are NVFlare's present interface; each client is weighed by its number of images. At the end this process judges
the model that NVFlare's server has written.
"""

import sys
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

from benchmarks.peers.nvflare_client import Network
from benchmarks.peers.work import Work, finish


def run(work: Work, turn: Path, threads: int) -> None:
    """Runs the simulator and judges its final model.

    Args:
        work: what is done.
        turn: folder for NVFlare's workspace and the result.
        threads: clients at once.
    """
    recipe = FedAvgRecipe(
        name="peers",
        model={"class_path": f"{Network.__module__}.{Network.__name__}", "args": {"folder": str(work.folder)}},
        min_clients=len(work.hospitals),
        num_rounds=work.recipe.rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=f"--work {work.folder} --turn {turn}",
    )
    names = [hospital.name for hospital in work.hospitals]
    environment = SimEnv(clients=names, num_threads=threads, workspace_root=str(turn / "nvflare"))
    result = Path(str(recipe.execute(environment).get_result()))
    module = Network(str(work.folder))
    found = sorted(result.rglob("FL_global_model.pt"))
    module.load_state_dict(torch.load(found[0], weights_only=False)["model"], strict=False)
    finish(work, module.network, turn)


if __name__ == "__main__":
    run(Work.read(Path(sys.argv[1]).resolve()), Path(sys.argv[2]).resolve(), int(sys.argv[3]))
