"""What `pneumofed demo` runs: small enough for minutes on two CPU cores, and every part of the way in it."""

from __future__ import annotations

from pathlib import Path

from simulation.plan import SimulationRequest


def demo_request(out: Path) -> SimulationRequest:
    """The demo, with the run folder `out`."""
    return SimulationRequest(
        hospitals=3,
        partition="dirichlet",
        alpha=1.0,
        phantoms=180,
        rounds=12,
        image_size=64,
        strategy="fedavg",
        settings={"name": "demo", "strategy": {"wait_for_sites": 3}, "training": {"batch_size": 16, "local_epochs": 1}},
        baselines=True,
        out=out,
    )
