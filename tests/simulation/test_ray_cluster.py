"""The same run on a Ray cluster by its address: two Ray nodes on this machine, one CPU each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pneumofed.common.ops.processes import free_port
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.plan import EngineName, Plan, build_plan
from pneumofed.simulation.runner import run_simulation
from pneumofed.simulation.superlink import Resources

RAY = Path(sys.executable).parent / "ray"
SMALL = {
    "rounds": 2,
    "image": {"size_px": 32},
    "model": {"name": "small_cnn"},
    "training": {"precision": "fp32"},
    "evaluation": {"bootstrap_samples": 20},
}


@pytest.fixture
def cluster() -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    common = ["--num-cpus", "1", "--disable-usage-stats", "--object-store-memory", "200000000"]
    head = ["--head", "--node-ip-address", "127.0.0.1", "--port", address.split(":")[1], "--include-dashboard", "false"]
    try:
        for where in (head, ["--address", address]):
            subprocess.run([str(RAY), "start", *where, *common], check=True, capture_output=True, env=environment, timeout=120)
        yield address
    finally:
        subprocess.run([str(RAY), "stop", "--force"], check=False, capture_output=True, timeout=60)


def run(out: Path, data: Path, engine: EngineName, address: str | None = None) -> np.ndarray:
    built = build_plan(out, SMALL, {"data": str(data), "hospitals": 4, "device": "cpu", "partition": "iid"})
    plan = Plan(*built, run_dir=out, resources=Resources(4, ray_address=address), engine=engine)
    assert run_simulation(plan, lambda _: None).status == "succeeded"
    return read_checkpoint(RunFolder(out).last_checkpoint).arrays.parameters


@pytest.mark.slow
def test_two_ray_nodes_give_the_weights_of_one_process(cluster: str, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "set", patients=24, seed=0, size_px=64)
    together = run(tmp_path / "cluster", tmp_path / "set", "flower", cluster)
    np.testing.assert_array_equal(together, run(tmp_path / "local", tmp_path / "set", "local"))
