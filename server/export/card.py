"""The model card: Mitchell et al. 2019, "Model Cards for Model Reporting", section 4, heading by heading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pneumofed.common.config.classes import in_words, positive_word
from pneumofed.common.imaging.patient_groups import KINDS
from pneumofed.common.model_bundle.manifest import (
    MIN_REFERENCE_IMAGES,
    BundleManifest,
    IntervalEstimate,
    Measured,
    Provenance,
    Quantization,
)
from pneumofed.common.model_bundle.population import JudgedGroup, JudgedPopulation, describe_groups
from pneumofed.common.ops.render import render
from pneumofed.common.ops.study_code import FOLDER, find_study_code, is_study_code
from pneumofed.server.export.source import HospitalLimits
from pneumofed.server.report.class_results import CLASS_METRICS
from pneumofed.server.report.numbers import DASH, number, whole

_NAMES = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "ece": "calibration error",
    "brier": "Brier score",
    "log_loss": "log loss",
    "accuracy_three_class": "accuracy of the most probable class",
    "auroc_macro": "AUROC, mean over classes",
    "sensitivity_macro": "sensitivity, mean over classes",
}
_CALIBRATION_METRICS = ("ece", "brier", "log_loss")
_GROUP_METRICS = ("auroc", "sensitivity", "specificity", "ece")


@dataclass(frozen=True)
class MetricTable:
    """Metrics of sets: a heading a column, a set a row; no row where nothing was measured."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Refusals:
    """Images of a set that the bundle would not judge, and those of them that are far from its reference."""

    name: str
    images: int
    refused: int
    far: int


def write_card(
    manifest: BundleManifest,
    refusals: Sequence[Refusals] = (),
    hospitals: HospitalLimits | None = None,
    personal_of: str | None = None,
) -> str:
    """Writes the card of `manifest` as Markdown: every number with its 95 % interval and the set that it was measured on.

    Args:
        manifest: of the bundle.
        refusals: by set, where they were counted.
        hospitals: whose patients the limits of the suitability check come from; None for the central set.
        personal_of: the hospital whose own model it is; None of a run's global model.
    """
    facts = manifest.card
    mixed = positive_word(manifest.classes) == "finding"
    whole_sets = [found for found in facts.measured if "," not in found.name]
    return render(
        __package__,
        "card.md",
        {
            "number": number,
            "whole": whole,
            "short": lambda value: f"{value:g}",
            "for_task": lambda text: in_words(text, manifest.classes),
        },
        manifest=manifest,
        mixed=mixed,
        network=_network(manifest),
        personal_of=personal_of,
        refusal_rows=[
            [one.name, *map(whole, (one.images, one.refused, one.far)), f"{one.refused / one.images:.1%}"] for one in refusals
        ],
        hospitals=hospitals,
        least_reference=MIN_REFERENCE_IMAGES,
        evaluation_rows=[[found.name, *map(whole, (found.images, found.patients, found.positives))] for found in whole_sets],
        whole_sets=_metric_table(whole_sets, mixed),
        before=_metric_table([found for found in facts.uncalibrated if found.metrics.get("ece")], mixed, _CALIBRATION_METRICS),
        class_rows=[row for found in whole_sets for row in _class_rows(found, facts.uncalibrated, manifest.classes)],
        groups=_metric_table([found for found in facts.measured if "," in found.name], mixed, _GROUP_METRICS),
        population=_population(manifest.population) if manifest.population else None,
        int8_rows=[_quantization(found) for found in facts.quantization],
        provenance_rows=_provenance(facts.provenance) if facts.provenance else [],
    )


def _class_rows(found: Measured, uncalibrated: Sequence[Measured], classes: Sequence[str]) -> list[list[str]]:
    """Each class of a set against the rest, with its calibration error before and after; none where that was not measured."""
    before = next((one.metrics for one in uncalibrated if one.name == found.name), {})
    return [
        [
            *(found.name, name),
            *(_cell(found.metrics.get(f"{metric}_class_{k}")) for metric in CLASS_METRICS),
            *(_cell(metrics.get(f"ece_class_{k}")) for metrics in (before, found.metrics)),
        ]
        for k, name in enumerate(classes)
        if f"auroc_class_{k}" in found.metrics
    ]


def _network(manifest: BundleManifest) -> str:
    """A study's own with the file in the bundle and its whole hash."""
    name = manifest.model.name
    if not is_study_code(name):
        return name
    code = find_study_code(name)
    return f"the study's own {code.function}; its code, `{FOLDER}/{code.file}` in this bundle, has the SHA-256 `{code.digest}`"


@dataclass(frozen=True)
class _PopulationTable:
    rows: list[list[str]]
    judged: dict[str, str]
    least: int
    unknown_age: str
    mix: str


def _population(found: JudgedPopulation) -> _PopulationTable:
    shares = ", ".join(f"{share:.0%}" for share in found.mix.shares)
    return _PopulationTable(
        rows=[_population_row(one) for one in found.groups],
        judged={kind: describe_groups(kind, found.judged(kind)) for kind in KINDS},
        least=found.min_patients,
        unknown_age=whole(found.unknown_age) if found.unknown_age else "",
        mix=f"{whole(found.mix.sites)} hospital(s)" + (f", with these shares of the training images: {shares}" if shares else ""),
    )


def _population_row(found: JudgedGroup) -> list[str]:
    group = describe_groups(found.kind, found.groups)
    return [
        f"{group} (stated for the whole set)" if found.stated else group,
        found.held_out,
        whole(found.images),
        whole(found.patients),
        f"{whole(found.patients_without)} + {whole(found.patients_with_pneumonia)}",
        *(_cell(found.metrics.get(name)) for name in ("auroc", "sensitivity", "specificity")),
        "yes" if found.is_judged else "too few",
    ]


def _quantization(found: Quantization) -> list[str]:
    return [
        found.name,
        whole(found.images),
        _cell(found.auroc_float32),
        _cell(found.auroc_int8),
        f"{found.mean_difference:.4f}",
        f"{found.max_difference:.3f}",
        whole(found.changed_decisions),
    ]


def _provenance(found: Provenance) -> list[list[str]]:
    dirty = " (with uncommitted changes)" if found.git_dirty else ""
    return [
        ["run", f"`{found.run}`, round {found.round}"],
        ["checkpoint (SHA-256)", f"`{found.checkpoint}`"],
        ["configuration (SHA-256)", f"`{found.config}`"],
        ["code (git)", f"`{found.git_commit}`{dirty}" if found.git_commit else DASH],
        ["app that the hospitals approved (SHA-256)", f"`{found.app_bundle}`" if found.app_bundle else DASH],
        ["exported by", f"pneumofed {found.pneumofed}"],
    ]


def _metric_table(found: Sequence[Measured], mixed: bool, wanted: Sequence[str] = tuple(_NAMES)) -> MetricTable:
    """The table of `found`, with those of the `wanted` metrics that any of them has; `mixed` where not all classes are pneumonias."""
    shown = [name for name in wanted if any(name in one.metrics for one in found)]
    rows = [
        [
            f"{one.name} ({whole(one.images - one.positives)} + {whole(one.positives)})",
            *(_cell(one.metrics.get(name)) for name in shown),
        ]
        for one in found
    ]
    return MetricTable(
        ["set (normal + others)" if mixed else "set (normal + pneumonia)", *(_NAMES[name] for name in shown)], rows
    )


def _cell(estimate: IntervalEstimate | None) -> str:
    if estimate is None or estimate.value is None:
        return DASH
    span = f" ({number(estimate.low)}{DASH}{number(estimate.high)})" if estimate.low is not None else ""
    return number(estimate.value) + span
