"""The page of a survey: who has what, which site differs, and whether the study has the power that it needs, before a single step.

analyse_survey(result, assumptions)   all that the page says, in plain values; the same as JSON
write_survey_page(folder)             `report.html` and `analysis.json` from `survey.json`

Everything comes from the rounded tables that sites told, so that what a site hides is hidden here. A cell of fewer than ten patients
counts as `HIDDEN_COUNT` where histograms are compared, and as none where patients are counted for power.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pneumofed.common.config.classes import in_words
from pneumofed.common.config.experiment import Section
from pneumofed.common.config.parties import SurveyField
from pneumofed.common.errors import counted
from pneumofed.common.evaluation.comparison import Margins, area_bound
from pneumofed.common.evaluation.paired import PairedAreas
from pneumofed.common.evaluation.similarity import mean_divergence, stability_index
from pneumofed.common.ops.render import render
from pneumofed.common.wire.survey import NOT_STATED, SMALL_CELL, TITLES, SurveyAnswer, survey_cells
from pneumofed.server.federation.survey import SurveyResult, read_survey
from pneumofed.server.report.numbers import Z_95, number, whole
from pneumofed.server.runs.folder import write_text

HIDDEN_COUNT = 4.5
"""The middle of 0 to 9."""
MOVED = 0.25
"""By custom a stability index above it is a shift (see `common.evaluation.similarity`)."""
CHANCE = 0.99
MOST_NAMED = 6
"""Sites that the summary names."""
_LARGEST_FACTOR = 1e6
_STEPS = 40
PAGE, ANALYSIS = "report.html", "analysis.json"

Rate = Annotated[float, Field(gt=0.0, lt=0.5)]


class PowerAssumptions(Section):
    """What the power of the study is computed for."""

    auroc: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.9
    """Expected of the model."""
    margin: Rate = Margins().auroc
    """Loss of AUROC that a later model may have at most, as at the release gate."""
    alpha: Rate = Margins().alpha
    """One-sided error of that comparison."""
    power: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.8
    correlation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Of the two models' AUROC on the same patients."""


def area_error(auroc: float, sick: float, well: float) -> float:
    """Computes the standard error of an AUROC (Hanley and McNeil 1982, Radiology 143:29, equation 1, with Q1 and Q2 of equation 2).

    Args:
        auroc: assumed, in (0, 1).
        sick: patients with pneumonia; need not be whole.
        well: patients without.

    Returns:
        NaN where a class has fewer than one patient.
    """
    if min(sick, well) < 1.0:
        return math.nan
    q1, q2 = auroc / (2.0 - auroc), 2.0 * auroc**2 / (1.0 + auroc)
    spread = auroc * (1.0 - auroc) + (sick - 1.0) * (q1 - auroc**2) + (well - 1.0) * (q2 - auroc**2)
    return math.sqrt(spread / (sick * well))


def noninferiority_power(assumed: PowerAssumptions, sick: float, well: float) -> float:
    """Computes the chance that the release gate's test of AUROC passes a model which is as good as another one.

    Both are judged on the same patients, so that the variance of the difference is 2 (1 - r) SE^2 (Hanley and McNeil 1983, Radiology
    148:839). The test passes from some difference on, for which its bound (`area_bound`, the lower one of two) reaches the margin; power
    is the chance of so much (Obuchowski and McClish 1997, Statistics in Medicine 16:1529, for the usual bound alone).

    Args:
        assumed: AUROC of both models, margin, error and correlation.
        sick: patients with pneumonia.
        well: patients without.

    Returns:
        In [0, 1]; 0 where a class has nobody, or so few that not even a faultless model passes.
    """
    error = area_error(assumed.auroc, sick, well) * math.sqrt(2.0 * (1.0 - assumed.correlation))
    low, high = -assumed.margin, 2.0 * (1.0 - assumed.auroc)
    if math.isnan(error) or not _passes(assumed, sick, well, high):
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if _passes(assumed, sick, well, middle) else (middle, high)
    return NormalDist().cdf(-high / error)


def _passes(assumed: PowerAssumptions, sick: float, well: float, difference: float) -> bool:
    """Whether the gate's test passes two models with the assumed variances whose AUROCs, about the assumed one, differ so."""
    variance = area_error(assumed.auroc, sick, well) ** 2
    new = min(assumed.auroc + difference / 2.0, 1.0)
    areas = PairedAreas(new - difference, new, variance, variance, assumed.correlation * variance)
    return area_bound(areas, (sick, well), assumed.alpha) > -assumed.margin


def noninferiority_patients(assumed: PowerAssumptions, sick: float, well: float) -> tuple[int, int] | None:
    """Computes how many patients with and without pneumonia have the assumed power, in the ratio of `sick` to `well`.

    Args:
        assumed: power, and what it is for.
        sick: patients with pneumonia in the federation.
        well: patients without.

    Returns:
        (with, without), the smallest numbers to a patient; None where a class has nobody.
    """
    if min(sick, well) < 1.0:
        return None
    low, high = math.log(1.0 / min(sick, well)), math.log(_LARGEST_FACTOR)
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        kept = sick * math.exp(middle), well * math.exp(middle)
        error = area_error(assumed.auroc, *kept) * math.sqrt(2.0 * (1.0 - assumed.correlation))
        enough = min(kept) >= 1.0 and _passes(assumed, *kept, -NormalDist().inv_cdf(assumed.power) * error)
        low, high = (low, middle) if enough else (middle, high)
    return math.ceil(sick * math.exp(high)), math.ceil(well * math.exp(high))


def analyse_survey(result: SurveyResult, assumed: PowerAssumptions) -> dict[str, Any]:
    """Computes all that the page says, in plain values.

    Args:
        result: what the sites told.
        assumed: for the power.
    """
    labels = {site: classes for site, answer in result.answers.items() if (classes := _classes(answer)) is not None}
    pooled = sum(sick for sick, _ in labels.values()), sum(well for _, well in labels.values())
    share = result.validation_fraction
    rows = {**labels, "all together": pooled} if len(labels) > 1 else labels
    return {
        "name": result.name,
        "sites": {site: {"patients": answer.patients} for site, answer in result.answers.items()},
        "absent": dict(result.absent),
        "patients": sum(answer.patients for answer in result.answers.values()),
        "with_pneumonia": pooled[0] if labels else None,
        "without": pooled[1] if labels else None,
        "label_skew_bits": mean_divergence(list(labels.values())) if len(labels) > 1 else None,
        "distances": {field: found for field in result.asked if (found := _distances(field, result.answers, result.classes))},
        "assumptions": assumed.model_dump(),
        "power": {name: _power(assumed, *classes, share) for name, classes in rows.items()},
        "validation_fraction": share,
        "needed": noninferiority_patients(assumed, *pooled) if labels else None,
    }


def write_survey_page(folder: Path, assumed: PowerAssumptions | None = None) -> Path:
    """Writes the page of the survey in `folder`, and what it says as JSON beside it.

    Args:
        folder: with `survey.json`.
        assumed: for the power; the defaults where it is None.

    Returns:
        The page.

    Raises:
        ConfigError: the folder holds no survey.
    """
    result, chosen = read_survey(folder), assumed or PowerAssumptions()
    found = analyse_survey(result, chosen)
    write_text(folder / ANALYSIS, json.dumps(found, indent=2) + "\n")
    context = {
        "result": result,
        "found": found,
        "sentences": survey_sentences(result, found),
        "tables": [_table(field, result) for field in result.asked],
        "distance_rows": _distance_rows(result, found),
        "power_rows": found["power"],
        "titles": TITLES,
        "small": SMALL_CELL,
        "moved": MOVED,
    }
    shown = {"number": number, "whole": whole, "for_task": lambda text: in_words(text, result.classes)}
    write_text(folder / PAGE, render(__package__, "survey.html", shown, **context))
    return folder / PAGE


def survey_sentences(result: SurveyResult, found: Mapping[str, Any]) -> list[str]:
    """Says what the survey brought, for people.

    Args:
        result: what the sites told.
        found: as `analyse_survey` gives it.
    """
    sites = counted(len(result.answers), "hospital")
    share = ""
    if found["with_pneumonia"] is not None and (both := found["with_pneumonia"] + found["without"]):
        share = f", {found['with_pneumonia'] / both:.0%} of them with pneumonia"
    said = [f"{sites} answered, with about {found['patients']:,} patients{share}."]
    if found["label_skew_bits"] is not None:
        said.append(
            f"The label skew is {found['label_skew_bits']:.3f} bits: 0 means that all hospitals have the same share of pneumonia, 1 that "
            "each has one class only."
        )
    moved = {
        site: [field for field, sites in found["distances"].items() if sites.get(site, {}).get("differs")]
        for site in result.answers
    }
    differing = {site: fields for site, fields in moved.items() if fields}
    for site, fields in list(differing.items())[:MOST_NAMED]:
        names = ", ".join(TITLES[field].partition(",")[0].partition(";")[0] for field in fields)
        said.append(f"{site} differs from most others by {names}.")
    if len(differing) > MOST_NAMED:
        said.append(f"So do {counted(len(differing) - MOST_NAMED, 'more hospital')}, see below.")
    if len(result.answers) > 1 and not differing:
        said.append("No hospital differs from most others in what was told by more than chance.")
    return [in_words(sentence, result.classes) for sentence in (*said, *_power_sentences(found))]


def _power_sentences(found: Mapping[str, Any]) -> list[str]:
    together = found["power"].get("all together") or next(iter(found["power"].values()), None)
    if together is None or together["power"] is None or found["needed"] is None:
        return ["Nothing can be said of the study's power: it needs ten patients with pneumonia and ten without."]
    assumed, (sick, well) = found["assumptions"], found["needed"]
    enough = together["power"] >= assumed["power"]
    return [
        f"On the patients that are kept for validation ({found['validation_fraction']:.0%}), an AUROC of {assumed['auroc']:g} would be "
        f"known to within {Z_95 * together['error']:.3f} (95%).",
        f"To show that another model is not worse by more than {assumed['margin']:g} of AUROC takes {sick:,} patients with pneumonia and "
        f"{well:,} without (power {assumed['power']:.0%}); validation has about {together['sick']:,.0f} and {together['well']:,.0f}, "
        f"{'enough' if enough else 'not enough'}: the power is {together['power']:.0%}. This is one test of AUROC, on all of them "
        "together: the release gate makes it on each held-out set and at each hospital, and tests sensitivity and specificity too, and all "
        "must pass.",
    ]


def _classes(answer: SurveyAnswer) -> tuple[int, int] | None:
    """Patients with pneumonia and without; None where the site does not tell labels."""
    if "label" not in answer.tables:
        return None
    cells = answer.known("label")
    return sum(patients for label, patients in cells.items() if label != "normal"), cells.get("normal", 0)


def _binary(answer: SurveyAnswer) -> dict[str, int]:
    sick, well = _classes(answer) or (0, 0)
    return {label: patients for label, patients in (("pneumonia", sick), ("normal", well)) if patients}


def _power(assumed: PowerAssumptions, sick: int, well: int, share: float) -> dict[str, float | None]:
    kept = sick * share, well * share
    error = area_error(assumed.auroc, *kept)
    shown = None if math.isnan(error) else error
    told = {"sick": kept[0] if sick else None, "well": kept[1] if well else None}  # a hidden class is not none
    return {**told, "error": shown, "power": noninferiority_power(assumed, *kept) if shown else None}


def _distances(field: SurveyField, answers: Mapping[str, SurveyAnswer], classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By site: the median of the stability indices against each other site that tells the field, and the most that chance would give there.

    The median, the lower of two, since against all others together one outlier would make every site differ.
    """
    known = {site: table for site, answer in answers.items() if (table := answer.known(field))}
    if field == "label" and not classes:  # how many causes a site states is no difference between its patients
        known = {site: _binary(answers[site]) for site in known}
    cells = [cell for cell in survey_cells(field, classes) if any(cell in table for table in known.values())]
    rows = {site: np.array([table.get(cell, HIDDEN_COUNT) for cell in cells]) for site, table in known.items()}
    if len(rows) < 2:
        return {}
    from scipy.stats import chi2  # a second to import

    quantile = float(chi2.ppf(CHANCE, max(1, len(cells) - 1)))
    found = {}
    for site, row in rows.items():
        pairs = [
            (stability_index(other, row), quantile * (1.0 / row.sum() + 1.0 / other.sum()))
            for name, other in rows.items()
            if name != site
        ]
        index, chance = sorted(pairs)[(len(pairs) - 1) // 2]
        found[site] = {"index": index, "chance": chance, "differs": bool(index > max(MOVED, chance))}
    return found


def _table(field: SurveyField, result: SurveyResult) -> dict[str, Any]:
    """One field: a row a site, a column for each cell that a site tells of."""
    answers, cells = result.answers, survey_cells(field, result.classes)
    shown = [cell for cell in (*cells, NOT_STATED) if any(cell in one.tables.get(field, {}) for one in answers.values())]
    empty = [cell for cell in cells if cell not in shown]
    rows = {site: _row(field, shown, answer) for site, answer in answers.items()}
    words = {row["said"] for row in rows.values()}
    return {
        "field": field,
        "title": "class of the planned run" if field == "label" and result.classes else TITLES[field],
        "cells": shown,
        "empty": empty,
        "rows": rows,
        "one_word": words.pop() if len(words) == 1 else "",
    }


def _row(field: SurveyField, cells: Sequence[str], answer: SurveyAnswer) -> dict[str, Any]:
    if field in answer.withheld:
        return {"said": "not told"}
    if field in answer.missing:
        return {"said": "not recorded"}
    table = answer.tables[field]
    total = sum(table.values())
    return {"said": "", "counts": [{"patients": table.get(cell), "share": table.get(cell, 0) / total} for cell in cells]}


def _distance_rows(result: SurveyResult, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields = list(found["distances"])
    return [
        {"site": site, "indices": [found["distances"][field].get(site) for field in fields]}
        for site in result.answers
        if any(site in found["distances"][field] for field in fields)
    ]
