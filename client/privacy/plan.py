"""One site's private training in numbers: sampling rate, steps, noise and delta, all from the experiment and the site's own counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from common.config import ExperimentConfig
from common.config_types import PrivacyUnit
from common.errors import ConfigError
from common.privacy.accounting import AccountantName, Mechanism, epsilon, noise_for


@dataclass(frozen=True)
class SitePlan:
    """What each round of a run does at one site, and what it costs; the same numbers drive sampling, noise and accounting."""

    unit: PrivacyUnit
    sampling_rate: float
    steps_per_round: int
    rounds: int
    delta: float
    accountant: AccountantName
    target_epsilon: float
    given_noise: float | None = None

    @classmethod
    def of(cls, experiment: ExperimentConfig, units: int, patients: int) -> SitePlan:
        """The plan of a site with so many training units (images or patients, as `privacy.unit` says) and training patients.

        The rate is `expected_batch_size` / units, 1 at most; a round takes the steps in which each unit is drawn `local_epochs` times
        on average, one at least. Delta is 1 / patients where the experiment names none, under either unit.

        Raises:
            ConfigError: the run is not private, or the site has fewer than two patients or no unit.
        """
        privacy = experiment.privacy
        if privacy.mechanism == "none":
            raise ConfigError("privacy.mechanism is 'none': nothing to plan")
        if units < 1 or patients < 2:
            raise ConfigError(f"private training needs two patients at least, got {patients}")
        rate = min(1.0, privacy.expected_batch_size / units)
        return cls(
            privacy.unit,
            rate,
            max(1, round(experiment.training.local_epochs / rate)),
            experiment.rounds,
            privacy.delta or 1.0 / patients,
            privacy.accountant,
            privacy.target_epsilon,
            privacy.noise_multiplier,
        )

    @cached_property
    def noise_multiplier(self) -> float:
        """The given one, or the smallest with which all rounds together keep to `target_epsilon`.

        Raises:
            ConfigError: no noise does.
        """
        if self.given_noise is not None:
            return self.given_noise
        return noise_for(
            self.target_epsilon, self.delta, (self.sampling_rate, self.steps_per_round * self.rounds), self.accountant
        )

    def round_mechanism(self) -> Mechanism:
        """What one round does."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, self.steps_per_round)

    def epsilon_after(self, rounds: int, before: Sequence[Mechanism] = ()) -> float:
        """Epsilon at `delta` of `before` and so many rounds of this plan."""
        return epsilon((*before, *[self.round_mechanism()] * rounds), self.delta, self.accountant)
