"""Clinical values of phantom patients, by a stated generative model in which image and values each carry a part of the truth.

    y                        is the patient ill? The label of all his images
    s | y                    do the images show an opacity? P(s | ill) = 0.85, P(s | well) = 0.35; a drawn image shows it beyond doubt
    temperature | y          normal, 37.0 °C and 0.5 °C, when ill 0.8 deviations higher
    crp | y                  log-normal, median 12 mg/L, when ill 1.0 deviations (a factor of 2.7) higher
    spo2 | y                 normal, 96.0 % and 1.2 %, when ill 0.6 deviations lower
    cough | y                yes with probability 0.7 when ill, else 0.4
    missing                  each value by itself, with the probability of its column, whatever y is

Given y all are independent. So the Bayes classifier adds up log-likelihood ratios, and its AUROC is computed without any draw
(`bayes_auroc`): the optimum that fusion can be compared with, with the image only, with the values only, and with both. Values are cut
at the ends of their ranges, which fewer than one in a thousand reach.

`give_values` starts from a phantom set, whose images are drawn already: s is what they show, and y is drawn given s by Bayes' rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from pneumofed.common.config.experiment import ClinicalColumn, ClinicalConfig
from pneumofed.common.data.manifest import ImageRecord, Manifest
from pneumofed.common.errors import ConfigError
from pneumofed.common.seeds import numpy_generator

SHOWN_IF_ILL, SHOWN_IF_WELL = 0.85, 0.35
COUGH_IF_ILL, COUGH_IF_WELL, COUGH_MISSING = 0.7, 0.4, 0.2
COUGH = ClinicalColumn(name="cough", kind="binary")


@dataclass(frozen=True)
class PhantomNumber:
    """A number of the generative model.

    Attributes:
        column: name, unit and range.
        well: its mean in the well; of a logarithm where `log`.
        deviation: in both.
        shift: of the ill, in deviations: d'.
        missing: probability that it is not known.
        log: whether its natural logarithm is normal.
    """

    column: ClinicalColumn
    well: float
    deviation: float
    shift: float
    missing: float
    log: bool = False

    def draw(self, ill: bool, normal: float) -> float:
        """Turns a standard normal number into a value.

        Args:
            ill: whose.
            normal: the number.
        """
        drawn = self.well + self.deviation * (normal + self.shift * ill)
        value = math.exp(drawn) if self.log else drawn
        assert self.column.low is not None and self.column.high is not None
        return round(min(self.column.high, max(self.column.low, value)), 2)


NUMBERS = (
    PhantomNumber(ClinicalColumn(name="temperature", unit="°C", low=34.0, high=43.0), 37.0, 0.5, 0.8, 0.1),
    PhantomNumber(ClinicalColumn(name="crp", unit="mg/L", low=0.0, high=600.0), math.log(12.0), 1.0, 1.0, 0.3, log=True),
    PhantomNumber(ClinicalColumn(name="spo2", unit="%", low=50.0, high=100.0), 96.0, 1.2, -0.6, 0.2),
)
PHANTOM_SCHEMA = ClinicalConfig(columns=(*(number.column for number in NUMBERS), COUGH))
"""The columns that phantoms have; a run's own schema may use some of them."""


def give_values(manifests: Sequence[Manifest], seed: int, lacking: Sequence[Sequence[str]] = ()) -> list[Manifest]:
    """Draws y and the clinical values of the patients of a set, and labels their images by y. Pure in the arguments.

    Args:
        manifests: the phantom images of each party; together they are the set, whose share of patients with an opacity counts.
        seed: of all draws.
        lacking: columns that a party does not have, by its place; a shorter list lacks nothing further on.

    Raises:
        ConfigError: so few or so many images show an opacity that no share of ill patients gives it.
    """
    shown = {record.patient: record.label != "normal" for manifest in manifests for record in manifest.records}
    share = sum(shown.values()) / max(1, len(shown))
    ill = (share - SHOWN_IF_WELL) / (SHOWN_IF_ILL - SHOWN_IF_WELL)
    if not 0.0 < ill < 1.0:
        raise ConfigError(
            f"{share:.0%} of the phantom patients show an opacity; with clinical values it must be between {SHOWN_IF_WELL:.0%} and "
            f"{SHOWN_IF_ILL:.0%} (simulation.phantoms.clinical)"
        )
    found = []
    for place, manifest in enumerate(manifests):
        without = set(lacking[place]) if place < len(lacking) else set()
        found.append(Manifest(tuple(_give(record, ill, share, seed, without) for record in manifest.records)))
    return found


def _give(record: ImageRecord, ill: float, share: float, seed: int, without: set[str]) -> ImageRecord:
    """The draws are the patient's own: all images have one label and one set of values."""
    rng = numpy_generator(seed, "clinical phantom", record.patient)
    shows = record.label != "normal"
    is_ill = bool(rng.random() < (ill * SHOWN_IF_ILL / share if shows else ill * (1.0 - SHOWN_IF_ILL) / (1.0 - share)))
    cause = ("bacterial", "viral")[int(rng.random() < 0.5)]
    cells = []
    for number in NUMBERS:
        value, known = number.draw(is_ill, float(rng.standard_normal())), rng.random() >= number.missing
        cells.append((f"{number.column.name} [{number.column.unit}]".lower(), str(value) if known else ""))
    cough, known = rng.random() < (COUGH_IF_ILL if is_ill else COUGH_IF_WELL), rng.random() >= COUGH_MISSING
    cells.append((COUGH.name, ("no", "yes")[int(cough)] if known else ""))
    label = (record.label if shows else cause) if is_ill else "normal"
    others = tuple((name, cell) for name, cell in cells if cell and name.partition(" ")[0] not in without)
    return replace(record, label=label, others=(*record.others, *others))


def bayes_auroc(*, image: bool = True, values: bool = True) -> float:
    """Computes the AUROC of the Bayes classifier of y; without both it is 0.5.

    Whatever is discrete (s, cough, which values are missing) makes a component: its probability in the ill and in the well, and its own
    log-likelihood ratio c. In it the numbers that are known add a ratio that is normal, with mean +-D/2 and variance D, D = sum of their
    d'^2. AUROC = sum over pairs of components of P_i(ill) P_j(well) Phi((c_i - c_j + (D_i + D_j) / 2) / sqrt(D_i + D_j)).

    Args:
        image: whether the classifier sees the image.
        values: whether it sees the clinical values.
    """
    components = list(_components(image, values))
    area = 0.0
    for p_ill, _, c_ill, d_ill in components:
        for _, p_well, c_well, d_well in components:
            spread, lead = d_ill + d_well, c_ill - c_well + (d_ill + d_well) / 2.0
            ahead = (
                0.5 * (1.0 + math.erf(lead / math.sqrt(2.0 * spread))) if spread else 0.5 + 0.5 * float(np.sign(round(lead, 12)))
            )
            area += p_ill * p_well * ahead
    return area


def _components(image: bool, values: bool) -> Iterator[tuple[float, float, float, float]]:
    """(probability in the ill, in the well, log-likelihood ratio, D) of each."""
    shows = [(SHOWN_IF_ILL, SHOWN_IF_WELL), (1.0 - SHOWN_IF_ILL, 1.0 - SHOWN_IF_WELL)] if image else [(1.0, 1.0)]
    known = 1.0 - COUGH_MISSING
    coughs = [(COUGH_MISSING, COUGH_MISSING), (known * COUGH_IF_ILL, known * COUGH_IF_WELL)]
    coughs += [(known * (1.0 - COUGH_IF_ILL), known * (1.0 - COUGH_IF_WELL))]
    numbers = [((number.missing, 0.0), (1.0 - number.missing, number.shift**2)) for number in NUMBERS]
    if not values:
        coughs, numbers = [(1.0, 1.0)], []
    for (shown_ill, shown_well), (cough_ill, cough_well), *parts in product(shows, coughs, *numbers):
        p = math.prod(one for one, _ in parts)
        ratio = math.log(shown_ill / shown_well) + math.log(cough_ill / cough_well)
        yield shown_ill * cough_ill * p, shown_well * cough_well * p, ratio, sum(d for _, d in parts)
