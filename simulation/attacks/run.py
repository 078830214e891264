"""The bench from end to end: the attacks that were asked for, and their report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simulation.attacks.bench import Bench, Tell, attack_canaries, attack_membership
from simulation.attacks.inversion_bench import Inversion, attack_gradients
from simulation.attacks.report import Findings, write_findings
from simulation.attacks.settings import AttackName
from simulation.attacks.similarity import Images

NOTHING: tuple[Images | None, list[Inversion]] = (None, [])


def run_attacks(bench: Bench, attacks: Sequence[AttackName], out: Path, tell: Tell) -> Path:
    """Runs `attacks` and returns the path of the report, `out/attack.html`; `out/attack.json` holds the numbers.

    Pure in `bench` on one machine, but for a private experiment with `secure_noise`.

    Raises:
        ConfigError: the model cannot be trained privately.
        OSError: `out` cannot be written.
    """
    membership = attack_membership(bench, tell) if "membership" in attacks else []
    canaries = attack_canaries(bench, tell) if "canaries" in attacks else []
    images, inversions = attack_gradients(bench, tell) if "inversion" in attacks else NOTHING
    return write_findings(bench, Findings(membership, canaries, images, inversions), out)
