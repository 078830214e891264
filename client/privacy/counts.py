"""Numbers of images with noise, paid for in the ledger: the plain Gaussian mechanism (Dwork and Roth 2014, appendix A).

One image more or less changes one of the numbers by one, one patient at most as many as a patient has images. The same data in the
same split gets the same noisy numbers however often they are asked for, so they are paid for once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from client.privacy.entries import Entry
from client.privacy.lineages import DataUnits
from client.privacy.spending import limits_of, open_ledger
from client.site import Site
from common.audit_events import hash_experiment
from common.config import ExperimentConfig
from common.privacy.accounting import Mechanism
from common.privacy.randomness import RandomStream
from common.privacy.secret import fingerprint, own_secret, round_key


def noised_counts(site: Site, experiment: ExperimentConfig, counts: list[int], noise_multiplier: float) -> list[int]:
    """`counts`, whole numbers that one image moves by one in all, with the noise of the site's policy; none is below 0.

    The noise has deviation `noise_multiplier`, or where the policy protects patients so many times the images of a patient. It is in
    the ledger before it is drawn.

    Raises:
        PolicyError, BudgetError: as `Ledger.spend`; nothing was released.
    """
    units, limits = DataUnits.of(site), limits_of(site.config)
    content = "/".join((fingerprint(site.train), fingerprint(site.validation), experiment.task, limits.min_unit))
    token = hashlib.sha256(f"counts {content} {noise_multiplier!r}".encode()).hexdigest()[:16]
    ledger = open_ledger(site.config)
    if not any(entry.purpose == "counts" and entry.run == token for entry in ledger.earlier(units)):
        delta = limits.max_delta or 1.0 / max(2, len(set(units.patients)))
        mechanism = Mechanism(1.0, noise_multiplier, 1)
        k = units.images_per_patient
        entry = Entry(token, 0, experiment.name, hash_experiment(experiment), "counts", limits.min_unit, k, mechanism, delta)
        ledger.spend(entry, units, limits)
    deviation = noise_multiplier * (units.images_per_patient if limits.min_unit == "patient" else 1)
    stream = RandomStream(round_key(own_secret(Path(site.config.work_dir)), ("counts", token)))
    noisy = np.asarray(counts) + deviation * stream.normal(len(counts)).numpy()
    return [max(0, round(float(value))) for value in noisy]
