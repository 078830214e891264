"""The dossier of a run as one page for print: facts beside questions that only people can answer, which stay blank.

Headings follow the template of the Information Commissioner's Office for a data protection impact assessment (seven steps; UK and EU GDPR,
article 35(7)), then what a trusted research environment asks before a model leaves (SATRE 2.0.1, statement 3.3.07; the GRAIMATTER green
paper, Jefferson et al. 2022, arXiv 2211.01656). The page states what records say and judges nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pneumofed.client.site.dossier import SUITABILITY_COUNTS, Dossier, SentMessage
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.files import write_file
from pneumofed.common.ops.render import render

FOLDER = "dossier"
"""Below the work folder."""
UNKNOWN = "unknown"
NUMBERS_ONLY = {"train", "validation", "withheld", "classes", "count_noise"}
"""Keys of a report that stay where the data report is withheld (`client.federation.requests`)."""
Finding = bool | None
"""Whether a thing was in a message; None where its line does not say."""


@dataclass(frozen=True)
class Thing:
    """A kind of thing that may leave, in words, and the keys of policy.yaml that rule it."""

    title: str
    meaning: str
    rules: tuple[str, ...]
    found: Callable[[SentMessage], Finding]
    detail: Callable[[SentMessage], str]
    counts_bytes: bool = False


@dataclass(frozen=True)
class LeftThing:
    """What left of one kind in a run; `unknown` counts messages whose lines do not say whether it was in them."""

    title: str
    meaning: str
    messages: int
    unknown: int
    bytes: int | None
    detail: str
    rules: Mapping[str, Any]


def _is_plain(one: SentMessage, work: str) -> bool:
    return one.work == work and one.secure_sum is None


def _in_stage(one: SentMessage, masked: bool) -> bool:
    return one.secure_sum is not None and one.secure_sum.endswith(" mask") == masked


def _counts(one: SentMessage) -> Finding:
    if one.report is None:
        return True if "num-examples" in one.metrics else None
    return "train" in one.report or "num-examples" in one.metrics


def _data_report(one: SentMessage) -> Finding:
    return None if one.report is None else bool(set(one.report) - NUMBERS_ONLY)


def _statistics(one: SentMessage, own: bool = False) -> bool:
    """False too where the line says that they were of no image, as where they are withheld."""
    empty = one.values is not None and one.values.get("num-examples") == 0
    return _is_plain(one, "evaluate") and not empty and ("personal value" if own else "value") in one.metrics


def _scores(one: SentMessage) -> bool:
    empty = one.values is not None and one.values.get("num-examples") == 0
    return _is_plain(one, "evaluate") and not empty and set(one.metrics) >= SUITABILITY_COUNTS


def _training_metrics(one: SentMessage) -> str:
    names = [name for name in one.metrics if name != "num-examples"]
    values = one.values or {}
    return ", ".join(f"{name} {values[name]:.4g}" if isinstance(values.get(name), int | float) else name for name in names)


def _say_numbers(report: Mapping[str, Any] | None, wanted: Callable[[str], bool]) -> str:
    parts = []
    for key, value in (report or {}).items():
        if wanted(key) and key != "withheld" and value != {}:
            inner = ", ".join(f"{name} {count}" for name, count in value.items()) if isinstance(value, dict) else value
            parts.append(f"{key}: {inner}")
    return "; ".join(parts)


def _say_counts(one: SentMessage) -> str:
    examples = (one.values or {}).get("num-examples")
    return _say_numbers(one.report, NUMBERS_ONLY.__contains__) or (f"num-examples: {examples}" if examples is not None else "")


def _say_images(one: SentMessage) -> str:
    examples = (one.values or {}).get("num-examples")
    return "" if examples is None else f"of {examples:g} images"


THINGS = (
    Thing(
        "Model updates, each readable by the coordinator",
        "All weights of the network after training on this hospital's images. Where they carry no noise, whoever reads one can learn much "
        "about images.",
        ("strategies", "models", "min_patients", "max_rounds_per_day", "max_epsilon", "require_secure_aggregation"),
        lambda one: _is_plain(one, "train") and bool(one.arrays),
        lambda one: f"arrays {', '.join(one.arrays)}",
        counts_bytes=True,
    ),
    Thing(
        "Vectors under masks (secure aggregation)",
        "An update, or statistics, plus random masks that cancel only in the sum over all sites that took part. The sum itself is exact.",
        (
            "require_secure_aggregation",
            "min_sites_in_sum",
            "min_sum_threshold",
            "max_weight_in_sum",
            "max_sum_step",
            "min_neighbours",
        ),
        lambda one: _in_stage(one, masked=True),
        lambda one: str(one.secure_sum),
        counts_bytes=True,
    ),
    Thing(
        "Public keys, sealed shares and signatures of secure sums",
        "What sites exchange so that the masks cancel. They are computed from no image.",
        ("require_secure_aggregation", "min_sites_in_sum"),
        lambda one: _in_stage(one, masked=False),
        lambda one: "",
    ),
    Thing(
        "Numbers of images",
        "How many images the site trains and validates on.",
        ("count_noise",),
        _counts,
        _say_counts,
    ),
    Thing(
        "Report on the data",
        "How many images were found, used and left out, for which reason, of which class, of how many patients.",
        ("withhold", "max_epsilon", "max_epsilon_per_study", "count_noise"),
        _data_report,
        lambda one: _say_numbers(one.report, lambda key: key not in NUMBERS_ONLY or key == "classes"),
    ),
    Thing(
        "Tables of a survey",
        "How many patients there are by each field, in tens and without cells of fewer than ten, before any training.",
        ("survey", "withhold", "max_epsilon", "open_statistics", "count_noise"),
        lambda one: bool(one.tables),
        lambda one: f"by {', '.join(one.tables)}",
    ),
    Thing(
        "Sums of clinical numbers",
        "Of each column the number of training patients, the sum and the sum of squares, from which the sites' numbers are standardised.",
        ("min_validation_patients", "withhold", "count_noise"),
        lambda one: bool(one.sums),
        lambda one: f"of {', '.join(one.sums)}",
    ),
    Thing(
        "Metrics of training",
        "Loss, accuracy, steps, seconds and the like of a round; in a private run, without open_metrics, only those that no data is in.",
        ("withhold", "max_epsilon", "open_statistics", "count_noise"),
        lambda one: one.work == "train" and bool(set(one.metrics) - {"num-examples"}),
        _training_metrics,
    ),
    Thing(
        "Statistics of validation patients",
        "Histograms of the model's scores by class, without noise.",
        (
            "min_validation_patients",
            "max_evaluations_per_day",
            "max_evaluations_per_data",
            "score_bins",
            "withhold",
            "open_statistics",
        ),
        _statistics,
        _say_images,
    ),
    Thing(
        "Scores of the suitability check",
        "Counts of validation patients by score, in 64 bins for each of three tests, without noise.",
        ("min_validation_patients", "max_evaluations_per_day", "max_evaluations_per_data", "withhold", "open_statistics"),
        _scores,
        _say_images,
    ),
    Thing(
        "Statistics of a model of the hospital's own",
        "The same histograms, of a model that the site trains for itself.",
        ("train_alone", "min_validation_patients", "max_evaluations_per_day", "withhold", "open_statistics"),
        lambda one: _statistics(one, own=True),
        _say_images,
    ),
    Thing(
        "The model that this hospital trained alone, which other hospitals got to judge",
        "All weights of a network that was trained on this hospital's images only, without noise. Whoever has it can learn much of them.",
        ("share_own_model", "train_alone", "min_patients", "withhold", "max_epsilon", "require_secure_aggregation"),
        lambda one: _is_plain(one, "evaluate") and bool(one.arrays),
        lambda one: f"arrays {', '.join(one.arrays)}",
        counts_bytes=True,
    ),
)


def what_left(dossier: Dossier) -> list[LeftThing]:
    """Sums up by kind what left the site in the run; a kind that no message held, and none may have held, is left out.

    Args:
        dossier: the run's.
    """
    rows = []
    for thing in THINGS:
        found = [(one, thing.found(one)) for one in dossier.sent]
        held = [one for one, finding in found if finding]
        unknown = sum(finding is None for _, finding in found)
        if held or unknown:
            sizes = [one.bytes for one in held if one.bytes is not None]
            details = [detail for one in held if (detail := thing.detail(one))]
            rules = {key: dossier.policy.values.get(key, UNKNOWN) for key in thing.rules}
            size = sum(sizes) if thing.counts_bytes else None
            rows.append(LeftThing(thing.title, thing.meaning, len(held), unknown, size, details[-1] if details else "", rules))
    return rows


def withheld_kinds(dossier: Dossier) -> dict[str, int]:
    """Counts in how many answers each kind was withheld, as their lines say.

    Args:
        dossier: the run's.
    """
    kinds = [kind for one in dossier.sent for kind in one.withheld or ()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def problems_of(dossier: Dossier) -> list[str]:
    """Says why the records of the run cannot be relied on, in sentences; none where they can.

    Args:
        dossier: the run's.
    """
    log, coordinator = dossier.log, dossier.handed.coordinator
    found = [] if log.present else [f"the audit log {log.path} is missing"]
    if log.damage:
        found.append(f"the audit log {log.path} is damaged at line {log.damaged_line}: {log.damage}")
    if coordinator is not None and coordinator.missing:
        found.append(f"the coordinator's log knows {coordinator.missing} states of the audit log that are no longer in it")
    if dossier.budget.state == "closed":
        found.append("the privacy ledger is closed, so what was spent is unknown; `pneumofed privacy verify` says why")
    elif dossier.budget.problems:
        found.append(f"`pneumofed privacy verify` finds {dossier.budget.problems} problems of the privacy ledger")
    return found


def dossier_json(dossier: Dossier) -> dict[str, Any]:
    """Lists the facts of the page for programs; what is unknown is None.

    Args:
        dossier: the run's.
    """
    derived = {key: getattr(dossier, key) for key in ("state", "rounds_planned", "rounds_trained", "unanswered")}
    summed = {"left": [asdict(row) for row in what_left(dossier)], "withheld": withheld_kinds(dossier)}
    return {**asdict(dossier), **derived, **summed, "problems": problems_of(dossier)}


def render_dossier(dossier: Dossier) -> str:
    """Renders the page. It needs no other file and holds no script.

    Args:
        dossier: the run's.
    """
    filters: dict[str, Callable[..., str]] = {
        "whole": _whole,
        "short": _short,
        "when": _when,
        "shown": _shown,
        "estimate": _estimate,
        "rounds": _rounds,
    }
    text = render(
        __package__,
        "dossier.html",
        filters,
        d=dossier,
        problems=problems_of(dossier),
        left=what_left(dossier),
        withheld=withheld_kinds(dossier),
        silent=sum(one.withheld is None for one in dossier.sent),
        array_bytes=sum(one.bytes or 0 for one in dossier.sent),
        plain_updates=sum(_is_plain(one, "train") and bool(one.arrays) for one in dossier.sent),
        masked=sum(_in_stage(one, masked=True) for one in dossier.sent),
        update_bytes=next((one.bytes for one in reversed(dossier.sent) if one.work == "train" and one.arrays), None),
        data_hashes=list(dict.fromkeys(one.data for one in dossier.sent if one.data)),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def write_dossier(dossier: Dossier, folder: SiteFolder) -> Path:
    """Writes the page, which only the service's user can read, in place of an earlier one of the run.

    Args:
        dossier: the run's.
        folder: the site's.

    Returns:
        Its path, `work/dossier/RUN.html`.
    """
    name = dossier.run if re.fullmatch(r"[0-9a-f]{16}", dossier.run) else hashlib.sha256(dossier.run.encode()).hexdigest()[:16]
    path = folder.work / FOLDER / f"{name}.html"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(path, render_dossier(dossier).encode())
    return path


def _whole(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _short(value: float | str | None) -> str:
    """Three digits; `inf` of JSON and None stay words."""
    if value is None:
        return UNKNOWN
    return "no bound" if value == "inf" else f"{float(value):.3g}"


def _when(time: str | None) -> str:
    return UNKNOWN if time is None else f"{time[:10]} {time[11:19]} UTC"


def _shown(value: Any) -> str:
    """A value of policy.yaml."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"{one[:12]}…" if re.fullmatch("[0-9a-f]{64}", str(one)) else str(one) for one in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _estimate(found: tuple[float | None, float | None, float | None]) -> str:
    value, low, high = found
    span = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return "undefined" if value is None else f"{value:.3f}{span}"


def _rounds(numbers: tuple[int, ...]) -> str:
    """Whole numbers with runs of them shortened: `1 to 3, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if span[0] == span[-1] else f"{span[0]} to {span[-1]}" for span in spans) or "none"
