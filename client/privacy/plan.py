"""One site's private training in numbers, and the draw of the units that each step sees.

SitePlan       sampling rate, steps, noise and delta, all from the experiment and the site's own counts
UnitSampler    Poisson sampling of privacy units, at the plan's rate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pneumofed.common.config.choices import PrivacyUnit
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import default_delta
from pneumofed.common.errors import ConfigError
from pneumofed.common.privacy.accounting import AccountantName, Mechanism, epsilon, noise_for
from pneumofed.common.privacy.randomness import RandomStream


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
        """Makes the plan of a site with so many training units and patients.

        The rate is `expected_batch_size` / units, 1 at most; a round takes `training.local_steps`, or the steps in which each unit is
        drawn `local_epochs` times on average, one at least. Delta is that of the site's patients where the experiment names none, under
        either unit.

        Args:
            experiment: of the run.
            units: training images or patients, as `privacy.unit` says.
            patients: of training and validation together, which decide delta (`common.config.parties.default_delta`).

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
            experiment.training.local_steps or max(1, round(experiment.training.local_epochs / rate)),
            experiment.rounds,
            privacy.delta or default_delta(patients),
            privacy.accountant,
            privacy.target_epsilon,
            privacy.noise_multiplier,
        )

    @cached_property
    def noise_multiplier(self) -> float:
        """Returns the given one, or computes the smallest with which all rounds together keep to `target_epsilon`.

        Raises:
            ConfigError: no noise is enough.
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
        """Computes epsilon at `delta` of `before` and so many rounds of this plan.

        Args:
            rounds: 0 or more.
            before: mechanisms that ran on the data earlier.
        """
        return epsilon((*before, *[self.round_mechanism()] * rounds), self.delta, self.accountant)


@dataclass(frozen=True)
class UnitSampler:
    """Draws units, each on its own with probability `rate`, and of each drawn unit one image, uniformly and anew.

    A patient's whole record moves one clipped gradient at most, however many images it holds: with one image a step, adding or
    removing the patient is adding or removing one term of the sum.

    Attributes:
        rows: int64 [N], the data set's rows, unit by unit.
        counts: int64 [units], how many rows each unit has.
        rate: probability of a unit, in (0, 1].
    """

    rows: np.ndarray
    counts: np.ndarray
    rate: float

    @classmethod
    def of(cls, patients: Sequence[str], unit: PrivacyUnit, rate: float) -> UnitSampler:
        """Makes the sampler of a data set whose image i belongs to `patients[i]`.

        Args:
            patients: the patient of each image.
            unit: what is drawn: images one by one, or patients.
            rate: probability of a unit, in (0, 1].
        """
        if unit == "image":
            return cls(np.arange(len(patients)), np.ones(len(patients), dtype=np.int64), rate)
        _, owner, counts = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True, return_counts=True)
        return cls(np.argsort(owner, kind="stable"), counts, rate)

    def draw(self, stream: RandomStream) -> np.ndarray:
        """Draws one row of each drawn unit, int64; may be empty. As many numbers are taken from `stream` whatever is drawn."""
        drawn = stream.uniform(len(self.counts)) < self.rate
        choice = np.floor(stream.uniform(len(self.counts)) * self.counts).astype(np.int64)
        starts = np.cumsum(self.counts) - self.counts
        return self.rows[(starts + choice)[drawn]]


def split_into_lots(rows: np.ndarray, views: int, images_at_once: int) -> list[np.ndarray]:
    """Splits `rows`, each `views` times in a row, into lots of at most `images_at_once` images, but at least one whole unit.

    Args:
        rows: int64 [units], one row of each drawn unit.
        views: augmented views of each image, at least 1.
        images_at_once: what the memory takes.

    Returns:
        int64 arrays; none where no unit was drawn.
    """
    units_at_once = max(1, images_at_once // views)
    return [np.repeat(rows[start : start + units_at_once], views) for start in range(0, len(rows), units_at_once)]


def count_units(patients: Sequence[str], unit: PrivacyUnit) -> int:
    """Counts the units of a data set whose image i belongs to `patients[i]`.

    Args:
        patients: the patient of each image.
        unit: what counts as one.
    """
    return len(patients) if unit == "image" else len(set(patients))
