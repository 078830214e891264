"""The wording of findings: names, sentences and rows, the same for the page, the terminal and scripts.

`title` and `meaning` name the quantities, and what it means that one moved, for people who know radiographs. `describe_scanners` makes a
row of each quantity of each scanner, from which `sentences` and `as_numbers` are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np

from pneumofed.common.errors import counted
from pneumofed.common.imaging.patient_groups import AGE, SEX, VIEW
from pneumofed.common.model_bundle.population import describe_groups
from pneumofed.inference.monitor.e_processes import CORRECTIONS, REFUSALS, Direction, mix_rows
from pneumofed.inference.monitor.monitor import DriftFindings
from pneumofed.inference.monitor.reference import COMPONENT, LIKENESS, MIXES, PROBABILITY, Reference, group_shares
from pneumofed.inference.monitor.streams import EMBEDDING, FALSE_ALARM_RATE, Stream
from pneumofed.inference.monitor.two_sample import Floats, Prevalence, estimate_prevalence

TITLES = {
    "mean": "Mean grey",
    "deviation": "Contrast",
    "quantile_01": "Darkest 1 %",
    "quantile_10": "Darkest 10 %",
    "quantile_25": "Lower quartile of grey",
    "quantile_50": "Median grey",
    "quantile_75": "Upper quartile of grey",
    "quantile_90": "Brightest 10 %",
    "quantile_99": "Brightest 1 %",
    "black_share": "Black area",
    "white_share": "White area",
    "entropy_bits": "Grey levels in use",
    "gradient": "Sharpness",
    "laplacian": "Noise and fine detail",
    "left_right_difference": "Left against right",
    "border_mean": "Grey of the border",
    PROBABILITY: "Model's probability",
    LIKENESS: "Likeness to the reference",
    EMBEDDING: "Model's view of the image",
    CORRECTIONS: "Corrections by readers",
    REFUSALS: "Images that cannot be judged",
    MIXES[AGE]: "Ages of the patients",
    MIXES[SEX]: "Sex of the patients",
    MIXES[VIEW]: "Views, AP and PA",
}
_MEANINGS = {
    "mean": ("images are brighter", "images are darker"),
    "deviation": ("contrast is higher", "contrast is lower"),
    "quantile_01": ("blacks are lifted", "blacks are deeper"),
    "quantile_10": ("dark parts (air) are brighter", "dark parts (air) are darker"),
    "quantile_25": ("the darker half is brighter", "the darker half is darker"),
    "quantile_50": ("middle greys are brighter", "middle greys are darker"),
    "quantile_75": ("the brighter half is brighter", "the brighter half is darker"),
    "quantile_90": ("bright parts (bone, heart) are brighter", "bright parts (bone, heart) are darker"),
    "quantile_99": ("whites are brighter", "whites are greyer"),
    "black_share": ("more of the image is black: collimation, padding or air", "less of the image is black"),
    "white_share": ("more of the image is white: saturation, markers or a white border", "less of the image is white"),
    "entropy_bits": ("more grey levels are in use", "fewer grey levels are in use: stronger contrast curve or fewer bits"),
    "gradient": ("images are sharper, or noisier", "images are blurred, or smoothed"),
    "laplacian": ("more noise, or edge enhancement", "less noise: smoothing, blur or lower resolution"),
    "left_right_difference": ("the left half is brighter than usual", "the right half is brighter than usual"),
    "border_mean": ("the border is brighter", "the border is darker: collimation, padding or vignetting"),
    PROBABILITY: ("the model calls fewer images normal", "the model calls more images normal"),
    LIKENESS: ("images are closer to the typical one", "the model sees images unlike the reference"),
    CORRECTIONS: ("readers change more verdicts than the calibration expects", ""),
    REFUSALS: ("more images cannot be judged than allowed", ""),
    MIXES[AGE]: ("the patients are older", "the patients are younger"),
    MIXES[SEX]: ("more men and boys come", "more women and girls come"),
    MIXES[VIEW]: ("more images are in PA view", "more images are in AP view"),
}
_SPREADS = {"wider": "values vary more than in the reference", "narrower": "values vary less than in the reference"}

LEAST_SHOWN_P = 1e-6
PREVALENCE_PATIENTS = 200


def title(quantity: str) -> str:
    """Returns the title of a quantity, as `Contrast`; the name itself where it has none."""
    if quantity.startswith(COMPONENT):
        return f"Network's features, {quantity}"
    return TITLES.get(quantity, quantity[:1].upper() + quantity[1:].replace("_", " "))


def meaning(quantity: str, direction: Direction) -> str:
    """Words what it means that `quantity` moved in `direction`, as a clause.

    Args:
        quantity: name of a quantity; one without words of its own is described in general ones.
        direction: where its values moved.
    """
    if direction in _SPREADS:
        return _SPREADS[direction]
    if quantity.startswith(COMPONENT):
        return "the network sees something else"
    higher, lower = _MEANINGS.get(quantity, ("values are higher", "values are lower"))
    return higher if direction == "higher" else lower


@dataclass(frozen=True)
class QuantityStatus:
    """One quantity of one scanner, described.

    Attributes:
        scanner, quantity, title: its names.
        alarm: whether it alarms.
        alarm_day: the day of the alarm, None without one.
        alarm_patients: patients that arrived in the year until the alarm, None without one.
        p_value: valid at any time, adjusted for all that is watched.
        since: the day from which on it seems to have moved.
        meaning: what that means, in words; empty where there is next to no evidence.
        now, usual: median of the latest values and of those they are compared with; None for rates and mixes.
        shares: of a mix, by group: its share among the latest patients and among those they are compared with.
        images: number of values.
    """

    scanner: str
    quantity: str
    title: str
    alarm: bool
    alarm_day: date | None
    alarm_patients: int | None
    p_value: float
    since: date
    meaning: str
    now: float | None
    usual: float | None
    images: int
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain values; `shares` only of a mix."""
        return {name: value for name, value in vars(self).items() if name != "shares" or self.is_mix}

    @property
    def is_mix(self) -> bool:
        """Whether it is about which patients come, and not about their images."""
        return self.quantity in MIXES.values()

    @property
    def share_words(self) -> str:
        """The two groups of a mix that changed most, in words; empty for other quantities."""
        kind = next((kind for kind, name in MIXES.items() if name == self.quantity), "")
        moved = sorted(self.shares.items(), key=lambda item: -abs(item[1][0] - item[1][1]))[:2]
        return ", ".join(f"{describe_groups(kind, (group,))} {now:.0%}, usually {usual:.0%}" for group, (now, usual) in moved)


@dataclass(frozen=True)
class ScannerStatus:
    """One scanner, described: its rows, the clearest evidence first, and the share of pneumonia that the scores suggest."""

    name: str
    images: int
    patients: int
    rows: Sequence[QuantityStatus]
    prevalence: Prevalence | None
    own_baseline: bool

    @property
    def alarms(self) -> list[QuantityStatus]:
        """Rows that alarm: mixes of patients first, since what else has moved is to be read with them in mind."""
        return sorted((row for row in self.rows if row.alarm), key=lambda row: not row.is_mix)

    @property
    def with_evidence(self) -> list[QuantityStatus]:
        """Rows with some evidence."""
        return [row for row in self.rows if row.meaning]

    @property
    def without_evidence(self) -> list[QuantityStatus]:
        return [row for row in self.rows if not row.meaning]


def describe_scanners(findings: DriftFindings, reference: Reference) -> list[ScannerStatus]:
    """Describes every scanner that was seen, those with alarms first and then by name.

    Args:
        findings: of `find_drift`.
        reference: of the same bundle.
    """
    by_scanner: dict[str, list[Stream]] = {}
    for stream in findings.current:
        by_scanner.setdefault(stream.scanner, []).append(stream)
    described = [_describe_scanner(name, streams, findings, reference) for name, streams in by_scanner.items()]
    return sorted(described, key=lambda scanner: (not scanner.alarms, scanner.name))


def sentences(findings: DriftFindings, scanners: Sequence[ScannerStatus]) -> list[str]:
    """Words the findings in a few plain sentences: what was judged, and the first three alarms of each scanner.

    Args:
        findings: of `find_drift`.
        scanners: of `describe_scanners` for the same findings.
    """
    if not scanners:
        return ["Nothing was judged since the watch began, or was begun anew, so there is nothing to compare."]
    days = np.unique(findings.found.days)
    span = f"{_day(days[0]):%d %B %Y} to {_day(days[-1]):%d %B %Y}"
    texts = [f"{len(findings.found):,} images on {counted(len(days), 'day')}, {span}, from {counted(len(scanners), 'scanner')}."]
    for scanner in scanners:
        texts += [f"{scanner.name}: {_sentence(row)}" for row in scanner.alarms[:3]]
        if any(row.is_mix for row in scanner.alarms):
            texts.append(_about_mix(scanner))
    alarmed = sum(len(scanner.alarms) for scanner in scanners)
    if not alarmed:
        texts.append("No alarm: what arrived cannot be told from what the model is compared with.")
    elif alarmed > len(texts) - 1:
        texts.append(f"{counted(alarmed, 'quantity', 'quantities')} alarm in all.")
    return texts


def _about_mix(scanner: ScannerStatus) -> str:
    others = [row for row in scanner.alarms if not row.is_mix and row.quantity not in (REFUSALS, CORRECTIONS)]
    if others:
        return f"{scanner.name}: images of one group of patients have changed as well, so it is not only the patients."
    return f"{scanner.name}: other patients come; within each group of patients no quantity of the images alarms."


def as_numbers(findings: DriftFindings, scanners: Sequence[ScannerStatus]) -> dict[str, Any]:
    """Builds the findings for scripts: all of it as plain values, dates as `date`.

    Args:
        findings: of `find_drift`.
        scanners: of `describe_scanners` for the same findings.
    """
    return {
        "alarm": any(scanner.alarms for scanner in scanners),
        "false_alarm_rate_per_year": FALSE_ALARM_RATE,
        "images": len(findings.found),
        "last_day": _day(findings.found.days[-1]),
        "scanners": [
            {"name": scanner.name, "images": scanner.images, "patients": scanner.patients, "own_baseline": scanner.own_baseline}
            | {"prevalence": None if scanner.prevalence is None else vars(scanner.prevalence)}
            | {"quantities": [row.to_json() for row in scanner.rows]}
            for scanner in scanners
        ],
        "days": [
            vars(seen) | {"day": _day(seen.day), "prevalence": None if seen.prevalence is None else vars(seen.prevalence)}
            for seen in findings.daily_tests
        ],
    }


def show_p(p_value: float) -> str:
    """Formats a p-value: `0.013`, `below 0.000001`."""
    if p_value < LEAST_SHOWN_P:
        return "below 0.000001"
    return f"{p_value:.2f}" if p_value >= 0.1 else f"{p_value:.2g}" if p_value >= 1e-3 else f"{p_value:.6f}"


def _describe_scanner(name: str, streams: Sequence[Stream], findings: DriftFindings, reference: Reference) -> ScannerStatus:
    rows = sorted((_describe_quantity(stream, findings, reference) for stream in streams), key=lambda row: row.p_value)
    own = findings.found.scanners == name
    scores = [
        findings.found.probabilities[stream.rows[-PREVALENCE_PATIENTS:]] for stream in streams if stream.quantity == PROBABILITY
    ]
    return ScannerStatus(
        name=name,
        images=int(own.sum()),
        patients=len(np.unique(findings.found.units[own])),
        rows=rows,
        prevalence=_prevalence(scores[0], reference) if scores else None,
        own_baseline=streams[0].test.own_baseline,
    )


def _prevalence(scores: Floats, reference: Reference) -> Prevalence | None:
    return estimate_prevalence(float(scores.mean()), float(scores.var()), len(scores), reference.separation)


def _describe_quantity(stream: Stream, findings: DriftFindings, reference: Reference) -> QuantityStatus:
    now, usual = _medians(stream, findings, reference)
    has_evidence = stream.p_value < 0.5
    return QuantityStatus(
        scanner=stream.scanner,
        quantity=stream.quantity,
        title=title(stream.quantity),
        alarm=stream.alarm is not None,
        alarm_day=None if stream.alarm is None else _day(stream.days[stream.alarm]),
        alarm_patients=None if stream.alarm is None else stream.alarm + 1,
        p_value=stream.p_value,
        since=_day(stream.since),
        meaning=meaning(stream.quantity, stream.direction) if has_evidence else "",
        now=now,
        usual=usual,
        images=len(stream.days),
        shares=_shares(stream, findings, reference),
    )


def _medians(stream: Stream, findings: DriftFindings, reference: Reference) -> tuple[float | None, float | None]:
    """(of the values since the change, of what they are compared with)."""
    if stream.quantity in (CORRECTIONS, REFUSALS, *MIXES.values()):
        return None, None
    new = stream.rows[stream.days >= stream.since]
    values = reference.values_of(findings.found.take(new))[stream.quantity]
    before = stream.test.rows[(stream.test.rows < stream.test.start) & ~findings.found.refused[stream.test.rows]]
    known = reference.values_of(findings.found.take(before)) if stream.test.own_baseline else reference.values
    return float(np.median(values)), float(np.median(known[stream.quantity]))


def _shares(stream: Stream, findings: DriftFindings, reference: Reference) -> dict[str, tuple[float, float]]:
    kind = next((kind for kind, name in MIXES.items() if name == stream.quantity), None)
    if kind is None:
        return {}
    found, rows = findings.found, mix_rows(findings.found, stream.test, kind)
    before = found.groups[rows[rows < stream.test.start]] if stream.test.own_baseline else reference.groups
    usual, now = group_shares(before, kind), group_shares(found.groups[stream.rows[stream.days >= stream.since]], kind)
    return {group: (now[group], share) for group, share in usual.items()}


def _sentence(row: QuantityStatus) -> str:
    numbers = "" if row.now is None or row.usual is None else f" (median {row.now:.3g}, usually {row.usual:.3g})"
    numbers = f" ({row.share_words})" if row.shares else numbers
    return f"{row.meaning}, since about {row.since:%d %B %Y}{numbers}; alarm on {row.alarm_day:%d %B %Y}."


def _day(ordinal: int | np.integer[Any]) -> date:
    return date.fromordinal(int(ordinal))
