"""What a ledger's entries cost together, for a patient or for an image.

Level of the account. Where all entries protect images, and the policy asks for no more, epsilon is that of one image added or removed.
As soon as one entry of the data protects patients, or the policy asks for it, epsilon is that of one patient added or removed with all
images, and each entry that protects images is counted as the following mechanism of a patient.

    Let a patient have at most k images and a step draw each with rate q. Without the patient the sum is N(0, s^2) up to a shift; with
    the patient it is moved by a vector of length j C at most, j ~ Binomial(k, q): a mixture of Gaussians, which is no easier to tell
    from N(0, s^2) than the one-dimensional mixture with shifts j C (Choquette-Choo et al. 2024, "Privacy amplification for matrix
    mechanisms", lemma 4.5; Ganesh 2024, arXiv 2401.10294, theorem 1). Such mixtures grow with their shifts in the stochastic order
    (ibid.), and j <= k [j > 0], where P(j > 0) = 1 - (1 - q)^k. So the step is at most the sampled Gaussian mechanism of rate
    1 - (1 - q)^k and noise multiplier sigma / k. Steps compose adaptively, hence entries do.

The other way does not hold: an entry that protects patients says nothing as small of one image among several of a patient, whose
removal replaces the patient's record in place of removing it. So an account with such entries is kept for patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common.config_types import PrivacyUnit
from common.errors import ConfigError
from common.privacy.accounting import AccountantName, Mechanism, epsilon

Purpose = Literal["training", "counts"]


@dataclass(frozen=True)
class Entry:
    """One mechanism that a site plans to run: one round of one run, or what else it releases. A repetition is another entry."""

    run: str
    """The run's token."""
    round: int
    study: str
    """Name of the experiment."""
    experiment: str
    """Its hash, as in the audit log."""
    purpose: Purpose
    unit: PrivacyUnit
    images_per_patient: int
    """Most images that a patient of the data has."""
    mechanism: Mechanism
    delta: float
    """With which the run was planned."""

    def __post_init__(self) -> None:
        if self.images_per_patient < 1:
            raise ConfigError(f"a patient has one image at least, got {self.images_per_patient}")
        if not 0.0 < self.delta < 1.0:
            raise ConfigError(f"delta must be in (0, 1), got {self.delta}")


def level_of(entries: Iterable[Entry], least: PrivacyUnit) -> PrivacyUnit:
    """Whose epsilon the account of `entries` is: a patient's if any of them, or `least`, says so."""
    return "patient" if least == "patient" or any(entry.unit == "patient" for entry in entries) else "image"


def total_epsilon(entries: Sequence[Entry], delta: float, level: PrivacyUnit, accountant: AccountantName = "prv") -> float:
    """Epsilon at `delta` of all `entries` for one unit of `level`, an upper bound. Entries that protect patients need that level."""
    return epsilon([mechanism_at(entry, level) for entry in entries], delta, accountant)


def mechanism_at(entry: Entry, level: PrivacyUnit) -> Mechanism:
    """The mechanism that bounds `entry` for one unit of `level` (see the head of this module).

    Raises:
        ConfigError: the entry protects patients and `level` is image.
    """
    if entry.unit == level:
        return entry.mechanism
    if level == "image":
        raise ConfigError("an entry that protects patients has no account for images")
    images, mechanism = entry.images_per_patient, entry.mechanism
    return replace(
        mechanism,
        sampling_rate=1.0 - (1.0 - mechanism.sampling_rate) ** images,
        noise_multiplier=mechanism.noise_multiplier / images,
    )
