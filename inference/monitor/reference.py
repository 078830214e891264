"""What is compared: the reference images of a bundle, the images that it judged at a site, and the groups of patients in both.

`Reference` holds the quantities of the images on which the model was evaluated, and the embedding that is fitted on a third of them.
`Observations` holds the same quantities of judged images as columns, in the order of arrival, without a pixel and without a patient.

The mix of a site's patients is watched by itself, and everything else within groups of patients. `Groups` holds the groups of N patients
as positions in `KINDS`, so that the mix of one kind (age, sex, view) is a quantity that can be ranked like any other: children come before
adults. `stratum_labels` names the stratum of each patient, all kinds together: an image is then compared only with images of the same
stratum (Mondrian conformal prediction: Vovk, Gammerman & Shafer 2005, section 4.5), so that more children this month do not look like a
change of the scanner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.patient_groups import AGE, KINDS, SEX, VIEW, PatientGroups
from pneumofed.common.model_bundle.manifest import MIN_REFERENCE_IMAGES, REFERENCE_GROUPS
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.two_sample import Embedding, Separation

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.bundle import Bundle

Groups = npt.NDArray[np.int64]
"""[N, 3]: for each of `KINDS` the position of the patient's group in it, `UNKNOWN_GROUP` where it is not known."""

UNKNOWN_GROUP = -1
MIXES = {AGE: "mix of ages", SEX: "mix of sexes", VIEW: "mix of views"}
"""Names of the quantities."""

Floats = npt.NDArray[np.float64]

FIT_SHARE = 1 / 3
"""Of the reference images, those that the embedding is fitted on and that no test of it uses."""
TESTED_COMPONENTS = 4
PROBABILITY, COMPONENT, LIKENESS = "probability", "component", "likeness"


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


@dataclass(frozen=True)
class Reference:
    """A bundle's reference images, one a patient, none of them seen in training.

    Attributes:
        digest: of the bundle; names the model, and seeds all that is drawn.
        names: of the K pixel statistics.
        statistics: float64 [M, K].
        probabilities: float64 [M].
        separation: of the score between the classes.
        embedding: fitted on a third of the images.
        rows: float64 [R, E], the embedding of the others.
        groups: int64 [M, 3], of the patients (`Groups`).
        others: int64 [R], the images of `rows`.
    """

    digest: str
    names: tuple[str, ...]
    statistics: Floats
    probabilities: Floats
    separation: Separation
    embedding: Embedding
    rows: Floats
    groups: Groups
    others: npt.NDArray[np.int64]

    @classmethod
    def of(cls, digest: str, names: Sequence[str], arrays: Mapping[str, npt.NDArray[np.generic]]) -> Reference:
        """Builds the reference from its arrays and fits the embedding on a third of the images.

        Args:
            digest: of the bundle; seeds which images the embedding is fitted on.
            names: of the K pixel statistics, in the order of the columns.
            arrays: `features` [M, D], `probabilities` [M], `pixel_statistics` [M, K], and if known `labels` [M] (1 pneumonia), and
                `age_group`, `sex` and `view` [M], words of the patients' groups, empty where one is not known.

        Raises:
            ConfigError: an array is missing, has another length or a value that is not finite, or there are fewer than 60 images.
        """
        features, probabilities, statistics = (
            _checked(arrays, name) for name in ("features", "probabilities", "pixel_statistics")
        )
        labels = _checked(arrays, "labels").astype(np.int64) if "labels" in arrays else None
        lengths = {len(values) for values in (features, probabilities, statistics, labels) if values is not None}
        if len(lengths) == 1 and len(features) < MIN_REFERENCE_IMAGES:
            raise ConfigError(
                f"the bundle's reference has {len(features)} patients, with fewer than {MIN_REFERENCE_IMAGES} drift cannot be watched; ask "
                "who exported the bundle for one with more (`pneumofed export --reference`)"
            )
        if len(lengths) > 1 or statistics.ndim != 2 or statistics.shape[1] != len(names):
            raise ConfigError(
                f"reference: expected arrays of one length, with {len(names)} pixel statistics, got "
                f"lengths {sorted(lengths)} and pixel statistics {statistics.shape}; export the bundle again"
            )
        fit, rest = _split(len(features), digest)
        embedding = Embedding.fit(features[fit])
        separation = Separation.of(probabilities, labels)
        groups = _groups(arrays, len(features))
        return cls(
            digest, tuple(names), statistics, probabilities, separation, embedding, embedding.map(features[rest]), groups, rest
        )

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the scalars that are tested one by one."""
        return (*self.names, PROBABILITY, *(f"{COMPONENT} {i + 1}" for i in range(TESTED_COMPONENTS)), LIKENESS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of groups whose mix is watched, and within which all quantities are."""
        return watched_kinds(self.groups)

    def groups_of(self, quantity: str) -> Groups:
        """Returns the groups of the patients of `values[quantity]`: those of the embedding are of fewer images."""
        return self.groups[self.others] if quantity == LIKENESS or quantity.startswith(COMPONENT) else self.groups

    @cached_property
    def values(self) -> dict[str, Floats]:
        """Each quantity of the reference images."""
        return self._columns(self.statistics, self.probabilities, self.rows)

    def values_of(self, found: Observations) -> dict[str, Floats]:
        """Computes each quantity of `found`, float64 [N] by name."""
        return self._columns(found.statistics, found.probabilities, found.embedding)

    def _columns(self, statistics: Floats, probabilities: Floats, rows: Floats) -> dict[str, Floats]:
        components = [rows[:, i] for i in range(TESTED_COMPONENTS)]
        columns = [*statistics.T, probabilities, *components, self.embedding.likeness(rows)]
        return dict(zip(self.quantities, columns, strict=True))


def reference_of(bundle: Bundle) -> Reference:
    """Reads the reference that `bundle` carries.

    Raises:
        BundleError: the bundle has no file of it, or it was changed.
        ConfigError: the bundle names no reference, or it is too small.
    """
    if bundle.manifest.reference is None:
        raise ConfigError("the bundle carries no reference to tell drift by; export it again with reference images")
    arrays = {name: values for name, values in vars(bundle.load_reference()).items() if values is not None}
    return Reference.of(bundle.digest, bundle.manifest.reference.statistics, arrays)


def _split(n: int, digest: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(rows for the fit, rows for the tests), the same for all who hold the bundle."""
    order = numpy_generator("drift", "split", digest).permutation(n)
    fit = round(n * FIT_SHARE)
    return np.sort(order[:fit]), np.sort(order[fit:])


def _groups(arrays: Mapping[str, npt.NDArray[np.generic]], count: int) -> Groups:
    columns = [arrays[name].tolist() if name in arrays else [""] * count for name in REFERENCE_GROUPS.values()]
    if any(len(words) != count for words in columns):
        raise ConfigError(f"reference: expected the groups of {count} patients; export the bundle again")
    return encode_words(columns)


def _checked(arrays: Mapping[str, npt.NDArray[np.generic]], name: str) -> Floats:
    if name not in arrays:
        raise ConfigError(f"reference: holds no '{name}'; export the bundle again")
    values = np.asarray(arrays[name], np.float64)
    if not np.isfinite(values).all():
        raise ConfigError(f"reference: '{name}' holds a value that is not finite; export the bundle again")
    return values


@dataclass(frozen=True)
class Observations:
    """N judged images in the order of their arrival; row i of each is the same image.

    Attributes:
        days: int64 [N], proleptic Gregorian ordinals of the days of judgement, not decreasing.
        scanners: the group of each image, e.g. manufacturer and model.
        units: an opaque word for the patient, or for the study where that is all that is known; never empty.
        statistics: float64 [N, K], of the pixels.
        embedding: float64 [N, E], see `Embedding`.
        probabilities: float64 [N], calibrated P(pneumonia); nan where refused.
        refused: bool [N], whether the model would not judge.
        expected_errors: float64 [N], the calibrated probability that the verdict is wrong; nan where refused.
        corrected: bool [N], whether the reader changed the verdict.
        read_order: int64 [N], rank of the image in the order of reading; -1 where no reader said anything.
        read_days: int64 [N], day of reading; -1 likewise.
        groups: int64 [N, 3], of the patients (`Groups`); not known without it.
    """

    days: npt.NDArray[np.int64]
    scanners: npt.NDArray[np.str_]
    units: npt.NDArray[np.str_]
    statistics: Floats
    embedding: Floats
    probabilities: Floats
    refused: npt.NDArray[np.bool_]
    expected_errors: Floats
    corrected: npt.NDArray[np.bool_]
    read_order: npt.NDArray[np.int64]
    read_days: npt.NDArray[np.int64]
    groups: Groups = field(default_factory=lambda: unknown_groups(0))

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.days):
            object.__setattr__(self, "groups", unknown_groups(len(self.days)))

    def __len__(self) -> int:
        return len(self.days)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> Observations:
        """Selects the images of `rows`, an index, a mask or a slice."""
        return Observations(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})
