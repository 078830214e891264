"""A site's answer to the question for sums of its clinical numbers, before the first round: over its training patients, by column, or not.

answer_clinical_sums(instruction, config, policy)   the reply: patients, sum and sum of squares of each column that may leave
sum_columns(data, schema)                           the same without any rule

A patient counts once, with the mean of his images. What leaves:

    without noise    columns that enough patients have: `LEAST_PATIENTS`, and as many as `min_validation_patients` asks for; of a whole
                     version of the patients, as an evaluation is (`client.federation.evaluations`), so that two answers never differ by
                     fewer
    with noise       where the policy sets `count_noise`: Gaussian, in the ledger before it is drawn, once for the same data
    nothing          where `withhold` names `data_report`; in private runs, the only ones that a site with a limit of epsilon answers,
                     and under secure aggregation nobody asks: the schema's range serves there, and costs nothing

A site that tells nothing takes part in the run all the same.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumofed.client.federation.evaluations import admit_units
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.requests import open_site_data
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE, SiteData
from pneumofed.client.federation.survey import SURVEYS_FOLDER
from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import MessageError, PolicyError
from pneumofed.common.privacy.randomness import data_fingerprint, own_secret, round_key
from pneumofed.common.wire.clinical_sums import LEAST_PATIENTS, ColumnSums, asked_columns, pack_sums, scale_of
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import Content

Sums = dict[str, ColumnSums]
PatientValues = dict[str, NDArray[np.float64]]
"""Patient -> his value of each asked column in units of the range, float64 [columns], NaN where not known."""


def answer_clinical_sums(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Content:
    """Sums the clinical numbers of the site's training patients, as far as its policy lets them leave.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Raises:
        PolicyError: nothing of them may leave; names the rule.
        BudgetError: the ledger has no budget for noised sums.
        MessageError: the run asks for none.
        DataError: a value does not fit the schema; the site's log says which column and row.
    """
    experiment = instruction.experiment
    if not experiment.asks_clinical_sums:
        raise MessageError("clinical sums: the experiment asks for none")
    _check_policy(policy)
    site = open_site_data(instruction, config, policy, "query")
    assert experiment.clinical is not None
    if policy.count_noise is not None:
        return pack_sums(config.name, _noised(site, experiment.clinical, instruction, policy))
    patients = None if config.policy is None else _admitted(site.train, experiment.clinical, instruction, config, policy)
    least = LEAST_PATIENTS if config.policy is None else max(LEAST_PATIENTS, policy.min_validation_patients)
    sums = sum_columns(site.train, experiment.clinical, patients)
    return pack_sums(config.name, {name: one for name, one in sums.items() if one.patients >= least})


def sum_columns(data: Dataset, schema: ClinicalConfig, patients: Collection[str] | None = None) -> Sums:
    """Computes the sums of each asked column.

    Args:
        data: with clinical values.
        schema: of the run.
        patients: who counts; None for all.
    """
    known = [values for patient, values in _by_patient(data, schema).items() if patients is None or patient in patients]
    table = np.array(known).reshape(len(known), -1)
    found: Sums = {}
    for number, column in enumerate(asked_columns(schema)):
        values = table[:, number][np.isfinite(table[:, number])] if len(table) else np.empty(0)
        found[column.name] = ColumnSums(float(len(values)), math.fsum(values), math.fsum(values**2))
    return found


def _by_patient(data: Dataset, schema: ClinicalConfig) -> PatientValues:
    assert data.clinical is not None
    starts = dict(zip((one.name for one in schema.columns), np.cumsum([0, *(one.slots for one in schema.columns)]), strict=False))
    columns = []
    for column in asked_columns(schema):
        middle, half = scale_of(column)
        values = (data.clinical[:, int(starts[column.name])].astype(np.float64) - middle) / half
        columns.append(np.clip(values, -1.0, 1.0))
    table = np.stack(columns, axis=1)
    rows: dict[str, list[int]] = {}
    for row, patient in enumerate(data.patients):
        rows.setdefault(patient, []).append(row)
    return {patient: _mean(table[found]) for patient, found in sorted(rows.items())}


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """By column over the rows that know it; NaN where none does."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _check_policy(policy: SitePolicy) -> None:
    if "data_report" in policy.withhold:
        raise PolicyError("withhold", "the data report is withheld, and with it sums of clinical values")


def _admitted(
    data: Dataset, schema: ClinicalConfig, instruction: Instruction, config: SiteConfig, policy: SitePolicy
) -> set[str]:
    """Those patients whom the answer may be about; it is counted."""
    work_dir = Path(config.work_dir)
    secret = own_secret(work_dir, SPLIT_KEY_FILE)
    names, units = {}, {}
    for patient, values in _by_patient(data, schema).items():
        names[patient] = round_key(secret, ("clinical", patient)).hex()[:32]
        units[names[patient]] = round_key(secret, ("clinical", patient, repr(values.tolist()))).hex()[:32]
    own = policy.model_copy(
        update={
            "min_validation_patients": max(LEAST_PATIENTS, policy.min_validation_patients),
            "max_evaluations_per_data": sys.maxsize,
        }
    )
    request = RunRequest.of(instruction.experiment, "query", instruction.run, instruction.round)
    columns = hashlib.sha256(repr([column.name for column in asked_columns(schema)]).encode()).hexdigest()[:16]
    (work_dir / SURVEYS_FOLDER).mkdir(mode=0o700, exist_ok=True)
    version = admit_units(units, request, own, work_dir / SURVEYS_FOLDER / f"clinical-{columns}.json", what="training patients")
    return {patient for patient, name in names.items() if name in version.units}


def _noised(site: SiteData, schema: ClinicalConfig, instruction: Instruction, policy: SitePolicy) -> Mapping[str, ColumnSums]:
    """The sums with noise, of columns whose noised count is large enough.

    A patient more or less moves the sums (1, u, u^2) of c columns by sqrt(3 c) in L2 norm at most, an image, which changes u by 2 at most
    and u^2 by 1, by sqrt(5 c).
    """
    from pneumofed.client.privacy.entries import DataUnits  # Opacus costs a second to import
    from pneumofed.client.privacy.ledger import noise_paid_once

    exact, units = sum_columns(site.train, schema), DataUnits.of(site)
    ranges = [(column.name, column.low, column.high) for column in asked_columns(schema)]
    about = (repr(ranges), data_fingerprint(site.train))
    stream, deviation = noise_paid_once("clinical", about, site.config, units, instruction.experiment, policy)
    deviation *= math.sqrt((3 if policy.min_unit == "patient" else 5) * len(exact))
    noise = (deviation * stream.normal(3 * len(exact)).numpy()).reshape(-1, 3).tolist()
    found = {}
    for (name, one), (first, second, third) in zip(exact.items(), noise, strict=True):
        patients = one.patients + first
        if patients >= LEAST_PATIENTS:
            total = min(patients, max(-patients, one.total + second))
            found[name] = ColumnSums(patients, total, min(patients, max(0.0, one.squares + third)))
    return found
