"""Numbers of images with noise, paid for in the ledger: the plain Gaussian mechanism (Dwork and Roth 2014, appendix A).

One image more or less changes one of the numbers by one, one patient at most as many as a patient has images. The same data in the
same split gets the same noisy numbers however often they are asked for, so they are paid for once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pneumofed.client.federation.site_data import SiteData
from pneumofed.client.privacy.delta import hospital_delta
from pneumofed.client.privacy.entries import DataUnits, LedgerEntry
from pneumofed.client.privacy.spending import open_ledger
from pneumofed.common.audit.log import hash_experiment
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.errors import ConfigError
from pneumofed.common.privacy.accounting import Mechanism
from pneumofed.common.privacy.randomness import RandomStream, data_fingerprint, own_secret, round_key


def noised_counts(site: SiteData, experiment: ExperimentConfig, counts: list[int], policy: SitePolicy) -> list[int]:
    """Adds noise to `counts`, whole numbers that one image moves by one in all, by the site's policy; none is below 0.

    The noise has deviation `count_noise`, or where the policy protects patients so many times the images of a patient. It is in
    the ledger before it is drawn.

    Args:
        site: the site's data.
        experiment: of the run.
        counts: exact.
        policy: the site's, with `count_noise` set.

    Raises:
        PolicyError, BudgetError: as `Ledger.spend`; nothing was released.
        ConfigError: the policy sets no noise.
    """
    if policy.count_noise is None:
        raise ConfigError("the policy sets no count_noise")
    units, noise_multiplier = DataUnits.of(site), policy.count_noise
    content = "/".join((data_fingerprint(site.train), data_fingerprint(site.validation), experiment.task, policy.min_unit))
    token = hashlib.sha256(f"counts {content} {noise_multiplier!r}".encode()).hexdigest()[:16]
    ledger = open_ledger(site.config)
    if not any(entry.purpose == "counts" and entry.run == token for entry in ledger.earlier(units)):
        delta = hospital_delta(policy, site.patients)
        mechanism = Mechanism(1.0, noise_multiplier, 1)
        k = units.images_per_patient
        entry = LedgerEntry(
            token, 0, experiment.name, hash_experiment(experiment), "counts", policy.min_unit, k, mechanism, delta
        )
        ledger.spend(entry, units, policy)
    deviation = noise_multiplier * (units.images_per_patient if policy.min_unit == "patient" else 1)
    stream = RandomStream(round_key(own_secret(Path(site.config.work_dir)), ("counts", token)))
    noisy = np.asarray(counts) + deviation * stream.normal(len(counts)).numpy()
    return [max(0, round(float(value))) for value in noisy]
