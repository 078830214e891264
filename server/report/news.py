"""What a reader must not miss: where the model is worse than another one, and whom it serves less well than the rest.

lead_sentences        the federated model against pooled images and against each hospital alone, also where it loses
subgroup_sentences    the groups of patients of whom clearly fewer are judged right than of the whole set
subgroup_tables       all groups of a set, with intervals
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pneumofed.common.config.classes import in_words
from pneumofed.common.errors import counted
from pneumofed.server.report.cross_site import cross_site_sentences
from pneumofed.server.report.numbers import ReportedEstimate, approximate, hundred_span, mean_over, of_hundred, whole
from pneumofed.server.report.personal import alone_sentences, personal_sentences
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.report.wording import describe_lead, with_interval
from pneumofed.server.runs.records import Metrics, set_noun
from pneumofed.server.runs.summary_records import BaselineLead

SHARES = {"sensitivity": ("with pneumonia", "found"), "specificity": ("without pneumonia", "called normal")}

LEAST_GAP = 0.005
"""Between a group's upper limit and the whole set: half an image of 100, below which the sentence would show no difference."""


@dataclass(frozen=True)
class SubgroupRow:
    """One group of the patients of a set, with intervals from counts; what the group cannot show is undefined."""

    name: str
    normal: str
    pneumonia: str
    estimates: list[ReportedEstimate]


@dataclass(frozen=True)
class SubgroupTable:
    """The groups of one central set."""

    noun: str
    rows: list[SubgroupRow]


def news(run: StoredRun) -> list[str]:
    """Writes all sentences of this module that the run gives reason for."""
    population = population_sentence(run)
    found = [*lead_sentences(run), *([population] if population else [])]
    return [*found, *personal_sentences(run), *alone_sentences(run), *cross_site_sentences(run), *subgroup_sentences(run)]


def lead_sentences(run: StoredRun) -> list[str]:
    """Says of each judged set whether the federated model is better, worse or not told apart, and which hospitals do better alone.

    Args:
        run: without baselines there is nothing to say.
    """
    return [text for name in run.sets if run.is_final(name) for text in _leads(run, name)]


def leads_of(run: StoredRun, central_set: str) -> list[str]:
    """Describes the federated model's leads on one set, each with its interval.

    Args:
        run: with baselines.
        central_set: `test` or `external`.
    """
    lead = run.summary.baselines.lead.get(central_set, BaselineLead()) if run.summary.baselines else BaselineLead()
    interval_name = run.interval_name(central_set)
    kind = "of all hospitals at once" if lead.simultaneous else "of this hospital by itself, which was picked as the best here,"
    texts = [
        describe_lead(lead.over_pooled, "training on all images pooled", interval_name),
        describe_lead(lead.over_best_alone, f"the best hospital alone ({lead.best_alone})", f"{interval_name} {kind}"),
    ]
    return [text for text in texts if text]


def _leads(run: StoredRun, central_set: str) -> list[str]:
    texts = [*leads_of(run, central_set), _who_gains(run, central_set) or _better_alone(run, central_set)]
    shown = " ".join(text for text in texts if text)
    return [f"On the {set_noun(central_set)}: {shown}"] if shown else []


def _who_gains(run: StoredRun, central_set: str) -> str:
    """Which hospitals gain and which lose by taking part, by intervals that leave out 0; empty where no run told each one's lead.

    The sentence says where each interval holds by itself, so that of many hospitals some win or lose by chance.
    """
    gains = gains_of(run, central_set)
    if not gains:
        return ""
    clear = {site: gain for site, gain in gains.items() if gain.clear}
    losers = [site for site, gain in clear.items() if (gain.value or 0.0) < 0]
    lost = f"{len(losers)} {'loses' if len(losers) == 1 else 'lose'}" + (
        f" ({', '.join(losers)})" if 0 < len(losers) <= 5 else ""
    )
    undecided = len(gains) - len(clear)
    baselines = run.summary.baselines
    at_once = baselines is not None and baselines.lead[central_set].simultaneous
    by_chance = "" if at_once else " Each interval is of one hospital by itself: of twenty, one wins or loses by chance."
    return (
        f"By taking part, of {counted(len(gains), 'hospital')} {len(clear) - len(losers)} "
        f"{'gains' if len(clear) - len(losers) == 1 else 'gain'}, {lost}, and of {undecided} it cannot be told.{by_chance}"
    )


def gains_of(run: StoredRun, central_set: str) -> dict[str, ReportedEstimate]:
    """Reads what each hospital gains by taking part: AUROC of the federated model minus that of its own, paired over patients.

    Args:
        run: empty without baselines, or of a version that did not compare with each hospital.
        central_set: name of a held-out set.
    """
    lead = run.summary.baselines.lead.get(central_set, BaselineLead()) if run.summary.baselines else BaselineLead()
    return {site: ReportedEstimate.of(gain) for site, gain in sorted(lead.over_alone.items())}


@dataclass(frozen=True)
class GainRow:
    """One hospital: on each set the AUROC of its own model, and what it gains by taking part."""

    name: str
    estimates: list[tuple[ReportedEstimate, ReportedEstimate]]


@dataclass(frozen=True)
class GainTable:
    """All hospitals on all held-out sets; `at_once` where intervals hold for all hospitals of a set together."""

    at_once: bool
    nouns: list[str]
    rows: list[GainRow]


def gain_table(run: StoredRun) -> GainTable | None:
    """Builds the table of each hospital's gain; None where there are no baselines."""
    gains = {name: found for name in run.sets if (found := gains_of(run, name))}
    if not gains or run.summary.baselines is None:
        return None
    alone = run.summary.baselines.alone
    sites = sorted({site for found in gains.values() for site in found})
    own = {site: {name: ReportedEstimate.of(alone[site].central(name).get("auroc")) for name in gains} for site in sites}
    rows = [GainRow(site, [(own[site][name], gains[name].get(site, ReportedEstimate())) for name in gains]) for site in sites]
    at_once = all(run.summary.baselines.lead[name].simultaneous for name in gains)
    return GainTable(at_once, [set_noun(name) for name in gains], rows)


def population_sentence(run: StoredRun) -> str:
    """Says the mean and the lowest AUROC over the held-out sets, of the federated and of the pooled model; empty of one set alone.

    Args:
        run: sets in which AUROC is undefined do not count.
    """
    pooled = run.summary.baselines.pooled if run.summary.baselines else None
    areas = {"Federated": {name: ReportedEstimate.of(run.summary.central(name).get("auroc")) for name in run.sets}}
    if pooled is not None:
        areas["pooled"] = {name: ReportedEstimate.of(pooled.central(name).get("auroc")) for name in run.sets}
    texts = [text for model, found in areas.items() if (text := _mean_and_worst(run, model, found))]
    return f"Over all held-out sets: {'; '.join(texts)}." if texts else ""


def _mean_and_worst(run: StoredRun, model: str, areas: Mapping[str, ReportedEstimate]) -> str:
    known = {name: (area.value, area) for name, area in areas.items() if area.value is not None}
    if len(known) < 2:
        return ""
    worst = min(known, key=lambda name: known[name][0])
    kind = run.interval_name(worst)
    mean = with_interval(mean_over([area for _, area in known.values()]), kind)
    return f"{model} mean AUROC {mean}, lowest {with_interval(areas[worst], kind)} in the {set_noun(worst)}"


def _better_alone(run: StoredRun, central_set: str) -> str:
    """Which hospitals' own models have the higher AUROC: by value, since an interval of each would be of many comparisons."""
    federated = ReportedEstimate.of(run.summary.central(central_set).get("auroc")).value
    alone = run.summary.baselines.alone if run.summary.baselines else {}
    areas = {site: ReportedEstimate.of(found.central(central_set).get("auroc")).value for site, found in alone.items()}
    known = {site: area for site, area in areas.items() if area is not None}
    if federated is None or not known:
        return ""
    better = [site for site, area in known.items() if area > federated]
    if not better:
        return f"No hospital has a higher AUROC alone, of {len(known)}."
    named = f" ({', '.join(better)})" if len(better) <= 5 else ""
    return (
        f"{len(better)} of {counted(len(known), 'hospital')} {'has' if len(better) == 1 else 'have'} a higher AUROC alone{named}."
    )


def subgroup_tables(run: StoredRun) -> list[SubgroupTable]:
    """Builds a table for each set whose manifest knows groups."""
    return [
        SubgroupTable(set_noun(name), [_row(group, found) for group, found in groups.items()])
        for name, groups in run.summary.subgroups.items()
    ]


def _row(name: str, found: Metrics) -> SubgroupRow:
    positive = found.n_positive or 0
    estimates = approximate(found)
    shown = [estimates[metric] for metric in ("auroc", *SHARES)]
    return SubgroupRow(name, whole((found.n or 0) - positive), whole(positive), shown)


def subgroup_sentences(run: StoredRun) -> list[str]:
    """Names the groups of which clearly fewer are judged right than of the whole set: the interval lies below the set's value.

    Args:
        run: without groups there is nothing to say.
    """
    known = run.summary.subgroups.items()
    return [text for name, groups in known for metric in SHARES for text in _worse(run, name, groups, metric)]


def _worse(run: StoredRun, central_set: str, groups: Mapping[str, Metrics], metric: str) -> list[str]:
    of, done = in_words(SHARES[metric][0], run.classes), SHARES[metric][1]
    whole_set = run.results(central_set).get(metric, ReportedEstimate()).value
    texts = []
    for name, found in groups.items():
        estimate = approximate(found)[metric]
        if whole_set is None or estimate.value is None or estimate.high is None or estimate.high > whole_set - LEAST_GAP:
            continue
        texts.append(
            f"In the {set_noun(central_set)}, of 100 images {of} of the group “{name}”, {of_hundred(estimate.value)} are {done} "
            f"(95% CI {hundred_span(estimate)}), of the whole set {of_hundred(whole_set)}."
        )
    return texts
