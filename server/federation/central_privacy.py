"""Central differential privacy: what a round reveals of any one site is bounded by clipping and hidden in the
coordinator's noise.

DP-FedAvg with updates of equal weight (McMahan, Ramage, Talwar and Zhang 2018, "Learning Differentially Private Recurrent Language
Models", algorithm 1): with w the weights before the round, w_i those that site i sent, n sites asked and C the clipping norm,

    w + 1/n * (sum over i of (w_i - w) * min(1, C / ||w_i - w||) + z),    z ~ Normal(0, (noise_multiplier * C)^2 I).

Guarantee: for two federations that differ in one site, whose updates become zero, everything that is computed from the weights of
all rounds is (epsilon, delta)-indistinguishable. A round is one Gaussian mechanism: no amplification by drawing sites is claimed, since
the history shows which were drawn. n is the number asked, so that a site that fails changes no divisor. What it does not protect: the
validation statistics and counts that the coordinator holds, and anything from the coordinator itself.

The noise comes from a secret in the run folder and everything that the sum depends on (`common.privacy.randomness`): a round that is
repeated after a crash gives the same weights, and one with other updates has independent noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pneumofed.common.config.experiment import CentralPrivacyConfig, ExperimentConfig
from pneumofed.common.privacy.accounting import Mechanism, epsilon, noise_for
from pneumofed.common.privacy.randomness import RandomStream, own_secret, round_key
from pneumofed.common.wire.messages import ModelArrays, Update


@dataclass(frozen=True)
class CentralPrivacy:
    """The mechanism of one run; `noise_multiplier` is fixed before its first round."""

    cfg: CentralPrivacyConfig
    noise_multiplier: float
    secret: bytes

    @classmethod
    def of(cls, experiment: ExperimentConfig, run_dir: Path) -> CentralPrivacy | None:
        """Builds the mechanism that `experiment` asks for; None where it asks for none.

        Args:
            experiment: `central_privacy`; without a noise multiplier, the one that spends `target_epsilon` over all planned
                rounds is used.
            run_dir: the run folder, where the noise's secret lies; made on first use.

        Raises:
            ConfigError: no noise keeps to the target.
        """
        cfg = experiment.central_privacy
        if not cfg.enabled:
            return None
        noise = cfg.noise_multiplier or noise_for(cfg.target_epsilon, cfg.delta, (1.0, experiment.rounds), "prv")
        return cls(cfg, noise, own_secret(run_dir))

    def epsilon(self, rounds: int) -> float:
        """Computes epsilon of so many rounds together, at the configuration's delta."""
        return epsilon([Mechanism(1.0, self.noise_multiplier, rounds)], self.cfg.delta, "prv")

    def combine(self, current: ModelArrays, updates: Sequence[Update], asked: int, number: int) -> Update:
        """Computes the noised mean as one update of weight 1, for the strategy to take; what it makes of it costs no more privacy.

        The same for any order of `updates`.

        Args:
            current: the weights before the round.
            updates: what came; empty statistics, since such networks have none.
            asked: sites that were asked, the divisor.
            number: the round.
        """
        ordered = sorted(updates, key=lambda update: update.presence.site)
        total, digest = np.zeros(len(current.parameters), np.float64), hashlib.sha256(current.parameters.tobytes())
        for update in ordered:
            change = clip(update.arrays.parameters.astype(np.float64) - current.parameters, self.cfg.clip_norm)
            digest.update(change.tobytes())
            total += change
        key = round_key(self.secret, ("central", repr(number), repr(asked), repr(self.noise_multiplier), digest.hexdigest()))
        total += RandomStream(key).normal(len(total)).numpy() * (self.noise_multiplier * self.cfg.clip_norm)
        mean = (current.parameters + total / asked).astype(np.float32)
        return Update.of(ordered[0].presence, ModelArrays(mean, current.statistics), 1, {})


def clip(change: np.ndarray, norm: float) -> np.ndarray:
    """Scales `change` down to the length `norm` if it is longer.

    Args:
        change: float64 [P], a site's weights minus those before the round.
        norm: the largest length, above 0.
    """
    length = float(np.linalg.norm(change))
    return change * (norm / length) if length > norm else change
