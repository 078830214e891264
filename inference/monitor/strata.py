"""Populations in the monitor: the mix of a site's patients is watched by itself, and everything else within groups of patients.

`Groups` holds the groups of N patients as positions in `KINDS`, so that the mix of one kind (age, sex, view) is a quantity that can be
ranked like any other: children come before adults. `stratum_labels` names the stratum of each patient, all kinds together: an image is then
compared only with images of the same stratum (Mondrian conformal prediction: Vovk, Gammerman & Shafer 2005, section 4.5), so that more
children this month do not look like a change of the scanner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pneumofed.common.imaging.patient_groups import AGE, KINDS, SEX, VIEW, PatientGroups
from pneumofed.common.model_bundle.manifest import MIN_REFERENCE_IMAGES

Groups = npt.NDArray[np.int64]
"""[N, 3]: for each of `KINDS` the position of the patient's group in it, `UNKNOWN_GROUP` where it is not known."""

UNKNOWN_GROUP = -1
MIXES = {AGE: "mix of ages", SEX: "mix of sexes", VIEW: "mix of views"}
"""Names of the quantities."""


def encode_groups(groups: Iterable[PatientGroups]) -> Groups:
    """Encodes the groups of N patients, int64 [N, 3]."""
    rows = [[_position(kind, dict(one.known()).get(kind, "")) for kind in KINDS] for one in groups]
    return np.array(rows, np.int64).reshape(-1, len(KINDS))


def encode_words(columns: Sequence[Sequence[str]]) -> Groups:
    """Encodes words as files keep them; a word that is no group, or an empty one, is not known.

    Args:
        columns: for each of `KINDS` N words.

    Returns:
        int64 [N, 3].
    """
    encoded = [[_position(kind, word) for word in words] for kind, words in zip(KINDS, columns, strict=True)]
    return np.array(encoded, np.int64).reshape(len(KINDS), -1).T


def unknown_groups(count: int) -> Groups:
    """Returns the groups of `count` patients of whom nothing is known."""
    return np.full((count, len(KINDS)), UNKNOWN_GROUP, np.int64)


def watched_kinds(reference: Groups) -> tuple[str, ...]:
    """Lists the kinds whose mix can be watched: known of at least `MIN_REFERENCE_IMAGES` patients of the reference, as for any quantity."""
    known = (reference != UNKNOWN_GROUP).sum(axis=0)
    return tuple(kind for kind, count in zip(KINDS, known, strict=True) if count >= MIN_REFERENCE_IMAGES)


def column_of(kind: str) -> int:
    """Returns the column of `kind` in `Groups`."""
    return tuple(KINDS).index(kind)


def stratum_labels(groups: Groups, kinds: Sequence[str]) -> npt.NDArray[np.int64]:
    """Computes the stratum of each patient, int64 [N]: one for each combination of groups of `kinds`; unknown is a group of its own.

    Args:
        groups: int64 [N, 3].
        kinds: what strata are made of; without any there is one stratum.
    """
    labels = np.zeros(len(groups), np.int64)
    for kind in kinds:
        labels = labels * (len(KINDS[kind]) + 1) + groups[:, column_of(kind)] + 1
    return labels


def group_shares(groups: Groups, kind: str) -> dict[str, float]:
    """Computes the share of each group of `kind` among those of whom it is known; empty where it is known of nobody."""
    column = groups[:, column_of(kind)]
    known = column[column != UNKNOWN_GROUP]
    counts = np.bincount(known, minlength=len(KINDS[kind]))
    return {str(group): float(count / len(known)) for group, count in zip(KINDS[kind], counts, strict=True)} if len(known) else {}


def _position(kind: str, word: str) -> int:
    names = [str(group) for group in KINDS[kind]]
    return names.index(word) if word in names else UNKNOWN_GROUP
