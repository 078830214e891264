"""Splits by patient: images of one patient are never on both sides.

split_by_key        each patient alone, by a secret: whoever joins or leaves moves nobody else, and only the hospital knows who is where
split_by_patient    stratified by class from a public seed, for simulated hospitals, which have no secret
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def split_by_key(
    patients: Sequence[str], share: float, key: bytes, known: Mapping[str, bool] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits images by a keyed hash of each patient into positions (int64, ascending) of training and of validation images.

    A patient is in validation where HMAC-SHA256 of the name under `key`, as a number in [0, 1), is below `share`.

    Guarantees:
        The two are disjoint and complete, and no patient is in both.
        A patient's side depends on the name, the key and the share only: data sets that differ by one patient differ by that one on
        either side, which is what differential privacy takes neighbours for. A larger share keeps those of a smaller one.
        A patient of `known` stays on the side that it names.
        The number in validation is binomial: about `share` of the patients, with neither classes nor numbers held.

    Args:
        patients: the patient of each image.
        share: of patients for validation, in [0, 1).
        key: secret of the hospital.
        known: whether a patient is in validation, of those who were drawn before.

    Raises:
        ValueError: `share` is outside [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"expected a share in [0, 1), got {share}")
    remembered = known or {}
    sides = {patient: remembered.get(patient, _keyed_uniform(key, patient) < share) for patient in set(patients)}
    in_validation = np.fromiter((sides[patient] for patient in patients), dtype=bool, count=len(patients))
    return np.flatnonzero(~in_validation).astype(np.int64), np.flatnonzero(in_validation).astype(np.int64)


def split_by_patient(
    patients: Sequence[str], labels: Sequence[int], fraction: float, seed: int, known: Mapping[str, bool] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits images by patient into positions (int64, ascending) of the training images and of the validation images.

    Guarantees:
        The two are disjoint and complete, and no patient is in both.
        Pure in the arguments. The patients on each side do not depend on the order of the rows, and a patient who joins the
        site moves few others.
        Of a class with n patients, between floor(fraction * n) and ceil(fraction * n) go to validation, and on average over seeds
        fraction * n, so that the pooled validation images of many small sites have the classes of the sites. Two exceptions:
        training keeps at least one patient of each class, and validation gets at least one patient if a class has two.
        A single patient, or one of each class, all stay in training.
        A patient of `known` stays on the side that it names, whatever joined or changed its label since; only new ones are drawn, to
        fill up validation. The shares above then hold as far as those who are known allow.

    Args:
        patients: the patient of each image.
        labels: the class of each image. A patient with several counts as the one that is rarest among all images.
        fraction: share of patients for validation, in [0, 1).
        seed: of the draw.
        known: whether a patient is in validation, of those who were drawn before.

    Raises:
        ValueError: the lengths differ or `fraction` is outside [0, 1).
    """
    if len(patients) != len(labels) or not 0.0 <= fraction < 1.0:
        raise ValueError(
            f"expected as many labels as patients and a fraction in [0, 1), got {len(patients)}, {len(labels)}, {fraction}"
        )
    strata = _strata(patients, labels, seed)
    counts = _validation_counts([len(stratum) for stratum in strata], fraction, _uniform(seed, *sorted(set(patients))))
    chosen = {patient for stratum, count in zip(strata, counts, strict=True) for patient in _choose(stratum, count, known or {})}
    in_validation = np.fromiter((patient in chosen for patient in patients), dtype=bool, count=len(patients))
    return np.flatnonzero(~in_validation).astype(np.int64), np.flatnonzero(in_validation).astype(np.int64)


def _strata(patients: Sequence[str], labels: Sequence[int], seed: int) -> list[list[str]]:
    """The patients of each class that occurs, by class, in an order drawn from `seed` and each patient's own name."""
    images = Counter(int(label) for label in labels)
    rarity = {label: rank for rank, label in enumerate(sorted(images, key=lambda label: (images[label], label)))}
    label_of: dict[str, int] = {}
    for patient, label in zip(patients, labels, strict=True):
        label_of[patient] = min(label_of.get(patient, int(label)), int(label), key=rarity.__getitem__)
    strata: dict[int, list[str]] = defaultdict(list)
    for patient in sorted(label_of, key=lambda patient: _uniform(seed, patient)):
        strata[label_of[patient]].append(patient)
    return [strata[label] for label in sorted(strata)]


def _validation_counts(sizes: Sequence[int], fraction: float, offset: float) -> list[int]:
    """How many of each stratum to take: `fraction * size` by systematic rounding (Madow 1949) from `offset` in [0, 1)."""
    if fraction == 0.0:
        return [0] * len(sizes)
    steps = [math.floor(fraction * int(total) + offset) for total in np.cumsum([0, *sizes])]
    counts = [min(after - before, size - 1) for (before, after), size in zip(pairwise(steps), sizes, strict=True)]
    if not any(counts) and max(sizes, default=0) > 1:
        counts[int(np.argmax(sizes))] = 1
    return counts


def _choose(stratum: Sequence[str], count: int, known: Mapping[str, bool]) -> list[str]:
    """Those of `stratum` that are known to be in validation, and as many of the new ones as make them `count`."""
    kept = [patient for patient in stratum if known.get(patient, False)]
    new = [patient for patient in stratum if patient not in known]
    return kept + new[: max(count - len(kept), 0)]


def _uniform(seed: int, *names: str) -> float:
    """A number in [0, 1) that is pure in its arguments, on any machine and in any process."""
    text = "\0".join((str(seed), *names)).encode("utf-8", errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:6]) / 2**48


def _keyed_uniform(key: bytes, patient: str) -> float:
    """A number in [0, 1) that is pure in its arguments, and random to who has no key."""
    digest = hmac.digest(key, patient.encode("utf-8", errors="surrogateescape"), "sha256")
    return int.from_bytes(digest[:6]) / 2**48
