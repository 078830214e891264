"""Training on a device that is not the CPU: nothing meets a tensor of the CPU, and the images go there once, as bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "case", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("proximal", "private", "features"))]
)
def test_a_round_on_a_card_gives_the_weights_of_the_cpu_and_sends_the_images_once_as_bytes(case: str) -> None:
    command = [sys.executable, "-m", "tests.client.federation.on_card", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # The noise of a private step depends on the last bits of the sum that it hides, so there is next to none here, and no AdamW, which
    # would make steps of those bits.
    assert max(found["differ"].values()) <= (1e-6 if case == "private" else 0.0)
    assert found["holds"] and found["channels_last"] and not found["mixes"]
    assert found["sent"].count(["torch.uint8", found["pixels"]]) >= 1
