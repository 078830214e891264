"""What `pneumofed demo` runs: small enough for minutes on two CPU cores, and every part of the way in it."""

from __future__ import annotations

from typing import Any

DEMO_EXPERIMENT: dict[str, Any] = {
    "name": "demo",
    "rounds": 12,
    "image": {"size_px": 64},
    "strategy": {"name": "fedavg", "wait_for_sites": 3},
    "training": {"batch_size": 16, "local_epochs": 1},
}

DEMO_SIMULATION: dict[str, Any] = {"hospitals": 3, "partition": "dirichlet", "alpha": 1.0, "phantom_patients": 180}
