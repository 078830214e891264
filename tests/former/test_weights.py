"""Small runs, and runs that an earlier version left unfinished, reach the weights that it reached, bit for bit.

The bits are compared where the processor and torch are the ones that made the fixtures; elsewhere the length of the weights is.
"""

from __future__ import annotations

import secrets
from functools import cache
from pathlib import Path

import pytest

from tests.former.make import CASES, NOISY, case_arguments, digest_of, length_of, machine
from tests.former.opened import call, read_json

PRIVATE = ("dp_sgd", "dp_sgd_convolutions", "central_privacy", "fedexp")
"""Their noise depends on the bits of the sum that it hides: another machine draws other noise, whose length differs by a percent or two."""
SLOW = (
    "secure_aggregation",
    "dp_sgd",
    "fedprox",
    "fedbn",
    "fedadam_ema",
    "fedexp",
    "central_privacy",
    "float16_updates",
    "sgd_focal_group_norm",
    "dp_sgd_convolutions",
)


@cache
def same_machine() -> str:
    """Why bits are not compared here; empty where they are."""
    made, here = read_json("digests")["machine"], machine()
    other = [f"{key} is {here[key]}, not {made[key]}" for key in made if key != "probe" and here[key] != made[key]]
    if not other and here["probe"] != made["probe"]:
        other = ["a training without our code has other last bits, so that this is another processor or library"]
    return "; ".join(other)


def check_weights(checkpoint: Path, digest: str, length: float | None = None, tolerance: float = 1e-2) -> None:
    """Compares a checkpoint with what the earlier version reached."""
    if length is not None:
        assert length_of(checkpoint) == pytest.approx(length, rel=tolerance)
    if same_machine():
        pytest.skip(f"the digest of the weights was made on another machine: {same_machine()}")
    assert digest_of(checkpoint) == digest


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_a_small_run_gives_the_weights_of_the_former_version(former: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NOISY:  # the run's random name goes into the key of the noise
        monkeypatch.setattr(secrets, "token_hex", lambda number=8: "0" * (2 * number))
    call(*case_arguments(name, former / "images", former / "run"))
    expected = read_json("digests")["runs"][name]
    tolerance = 5e-2 if name in PRIVATE else 1e-2
    check_weights(former / "run" / "checkpoints" / "last.pt", expected["weights"], expected["length"], tolerance)


@pytest.mark.parametrize("name", ["broken", pytest.param("broken-adam", marks=pytest.mark.slow)])
def test_a_run_that_the_former_version_left_is_resumed_to_the_weights_of_an_unbroken_one(former: Path, name: str) -> None:
    told = call("simulate", "--resume", "--out", former / name, "--engine", "local")
    assert "succeeded after 3 rounds" in told
    check_weights(former / name / "checkpoints" / "last.pt", read_json("digests")["resumed"][name])
