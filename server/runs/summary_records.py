"""What summary.json holds: how a run ended, its results with intervals, its data in counts, and the baselines beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, model_validator

from pneumofed.server.runs.records import Metrics, Record, RoundBytes, RoundRecord, StoredThreshold, by_set


class MetricInterval(Record):
    """A metric with its confidence interval; None where the metric, or every resample's, is undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    resamples: int | None = None
    """Resamples in which the metric was defined."""


Results = Mapping[str, MetricInterval]
"""By metric (`common.evaluation.metrics.metrics_of`): `auroc`, `sensitivity`, ..."""


class DataCounts(Record):
    """A party's images, in counts: see `common.data.manifest.DataReport.public`."""

    found: int | None = None
    used: int | None = None
    skipped: Mapping[str, int] | None = None
    """Images left out, by reason."""
    classes: Mapping[str, int] | None = None
    """Used images by class."""
    patients: int | None = None
    warnings: Mapping[str, int] | None = None

    @property
    def images(self) -> int | None:
        """Images that are used; those found where nobody counted the used ones."""
        return self.found if self.used is None else self.used


class SiteSummary(DataCounts):
    """A site's own counts, which came over the wire: what is no count is left out. Empty where sums are secret."""

    train: int | None = None
    """Training images."""
    validation: int | None = None
    """Validation images."""
    count_noise: float | None = None
    """Standard deviation of the noise on the counts, in images; None where they are exact."""
    withheld: tuple[str, ...] | None = None
    """What the site's policy keeps back (`common.config.experiment.Withheld`)."""

    @model_validator(mode="before")
    @classmethod
    def _keep_what_fits(cls, reported: object) -> object:
        if isinstance(reported, BaseModel):
            return reported
        values = {key: _fitting(key, value) for key, value in reported.items()} if isinstance(reported, dict) else {}
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


class ParentBundle(Record):
    """The model bundle that a run started from."""

    digest: str
    name: str | None = None
    signer: str | None = None
    trained_privately: bool | None = None


class RunBytes(RoundBytes):
    """Bytes of weights over all rounds."""

    total: int = 0


class DealtHospital(Record):
    """One virtual hospital's share of the patients."""

    name: str
    hospital: int | None = None
    """Its number, from 0."""
    images: int
    patients: int
    classes: Mapping[str, int]


class PartitionRecord(Record):
    """How a simulation dealt the patients to its virtual hospitals."""

    kind: str | None = None
    alpha: float | None = None
    """Concentration of the Dirichlet draws."""
    label_skew_bits: float | None = None
    """In [0, 1]: 0 is the same mix of classes everywhere."""
    hospitals: tuple[DealtHospital, ...] = ()


class BaselineResult(Record):
    """One baseline: the best round's model on the central sets, or why there is none."""

    error: str | None = None
    train: int | None = None
    """Training images."""
    validation: Metrics | None = None
    best_round: int | None = None
    threshold: StoredThreshold | None = None
    test: Results | None = None
    external: Results | None = None
    held_out: Mapping[str, Results] = {}
    """By name, of the other held-out sets."""

    @property
    def results(self) -> dict[str, Results]:
        """Results by central set, of those that were evaluated."""
        return by_set(self.test, self.external, self.held_out)

    def central(self, name: str) -> Results:
        """Returns the results on the central set `name`; empty where there are none.

        Args:
            name: of a held-out set.
        """
        return self.results.get(name) or {}


class MetricSpread(Record):
    """A metric over the hospitals in which it is defined."""

    mean: float | None = None
    best: float | None = None
    worst: float | None = None
    hospitals: int | None = None


class BaselineLead(Record):
    """AUROC of the federated model minus that of others, paired over patients."""

    best_alone: str | None = None
    over_pooled: MetricInterval | None = None
    over_best_alone: MetricInterval | None = None
    over_alone: Mapping[str, MetricInterval] = {}
    """By hospital: what it gains by taking part."""
    simultaneous: bool = False
    """Whether the intervals over hospitals hold for all of them at once; each by itself in runs of former versions."""


class BaselineTable(Record):
    """All baselines beside the federated model; `alone_summary` and `lead` are by central set."""

    pooled: BaselineResult | None = None
    alone: Mapping[str, BaselineResult] = {}
    """By hospital."""
    alone_summary: Mapping[str, Mapping[str, MetricSpread]] = {}
    lead: Mapping[str, BaselineLead] = {}


class PersonalComparison(Record):
    """A hospital's own model (`personal.method`, or one that it trained alone) and the global one on the hospital's validation images."""

    round: int
    """The last one in which its own model was judged, which the hospital has; of one trained alone, the global model's round."""
    personal: Metrics
    shared_round: int
    """The one whose global model was kept; if the hospital did not judge that one, the last that it judged."""
    shared: Metrics


class AloneComparisons(Record):
    """What the hospitals sent who trained alone (`evaluation.alone`); a file of the run folder."""

    round: int
    """Whose global model was kept."""
    sites: Mapping[str, PersonalComparison] = {}


class CrossSiteMatrix(Record):
    """How well the global model and each hospital's own do on each hospital's validation patients (`evaluation.cross_site`).

    A cell that is not there was not told: the judging hospital's policy, or too few patients, or a failure.
    """

    round: int
    """Whose global model was kept."""
    shared: Mapping[str, Metrics] = {}
    """By judging hospital: the global model."""
    own: Mapping[str, Mapping[str, Metrics]] = {}
    """By hospital whose model it is, then by judging hospital: what that hospital trained alone. One that gave its model is a key even
    where no hospital judged it."""
    not_given: Mapping[str, str] = {}
    """Hospital whose own model was not to be had -> why."""
    not_judged: Mapping[str, str] = {}
    """Hospital that did not judge all models -> why."""

    @property
    def hospitals(self) -> list[str]:
        """Names of the hospitals on whose patients any model was judged, sorted."""
        return sorted({*self.shared, *(judge for cells in self.own.values() for judge in cells)})


class WallTime(Record):
    """Wall time of a simulation and of its parts in seconds, summed over resumes; the report itself is not in it."""

    data: float = 0.0
    """Drawing or reading the images, and dealing them to hospitals."""
    rounds: float = 0.0
    """From the start of the engine to the end of the last round, its end too."""
    evaluation: float = 0.0
    """The final evaluation, with its intervals."""
    baselines: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by the parts' names for people, of those that took any."""
        named = {"data": self.data, "rounds": self.rounds, "final evaluation": self.evaluation, "baselines": self.baselines}
        return {name: seconds for name, seconds in named.items() if seconds > 0}

    @property
    def total(self) -> float:
        return self.data + self.rounds + self.evaluation + self.baselines


class RunSummary(Record):
    """Status and results of a run. All but `seconds` is about the whole run, over every resume."""

    status: str | None = None
    """`submitted`, `running`, `succeeded`, `failed` or `stopped`; None where no run has begun."""
    name: str | None = None
    seed: int | None = None
    parent: ParentBundle | None = None
    data: Mapping[str, DataCounts] = {}
    """By central set."""
    app_bundle: str | None = None
    """SHA-256 of the code that the hospitals approved; empty in one process."""
    threshold: StoredThreshold | None = None
    validation: Metrics | None = None
    classes: tuple[str, ...] | None = None
    """`normal` first."""
    sites: Mapping[str, SiteSummary] = {}
    absent: Mapping[str, str] | None = None
    """Site or node -> why it is not a site of the run."""
    test: Results | None = None
    external: Results | None = None
    held_out: Mapping[str, Results] = {}
    """By name, of the other held-out sets."""
    subgroups: Mapping[str, Mapping[str, Metrics]] = {}
    """By central set and group of its patients (cause, sex, age, view), where the manifest knows them."""
    error: str | None = None
    """Why the run did not succeed, in a sentence."""
    rounds_completed: int = 0
    best_round: int = 0
    """The round whose model was kept; 0 without one."""
    bytes: RunBytes | None = None
    seconds: float | None = None
    """Wall time from the first message to the end, summed over resumes: of rounds and final evaluation."""
    wall: WallTime | None = None
    """Of a simulation, the whole with its parts."""
    baselines: BaselineTable | None = None
    personal: Mapping[str, PersonalComparison] = {}
    """By hospital whose own model was judged."""
    alone: Mapping[str, PersonalComparison] = {}
    """By hospital that trained once by itself (`evaluation.alone`) and told how its model and the global one do there."""
    cross_site: CrossSiteMatrix | None = None
    """Every hospital's own model on every hospital's patients, where the experiment asked for it."""
    personal_of: str | None = None
    """The hospital whose own model this folder holds: of what `pneumofed site export-personal` exports, never of a run."""
    phantom: bool | None = None
    """Whether the images are drawn."""
    source: DataCounts | None = None
    """The training images before they were dealt, in a simulation."""
    partition: PartitionRecord | None = None

    @property
    def results(self) -> dict[str, Results]:
        """Final results by central set, of those that were evaluated."""
        return {name: found for name, found in by_set(self.test, self.external, self.held_out).items() if found}

    def central(self, name: str) -> Results:
        """Returns the final results on the central set `name`; empty where it was not evaluated.

        Args:
            name: of a held-out set.
        """
        return self.results.get(name) or {}

    def auroc(self, name: str) -> float:
        """Returns the final AUROC on the central set `name`; NaN where it is undefined or was not evaluated.

        Args:
            name: of a held-out set.
        """
        value = self.central(name).get("auroc", MetricInterval()).value
        return math.nan if value is None else value


def compare_personal(history: Sequence[RoundRecord], kept_round: int) -> dict[str, PersonalComparison]:
    """Puts each hospital's own model, as it was judged last, beside the global one that was kept; hospitals without one are left out.

    Args:
        history: every completed round.
        kept_round: whose global model was kept.
    """
    own = {site: line.round for line in history for site, part in line.sites.items() if part.personal is not None}
    lines, found = {line.round: line.sites for line in history}, {}
    for site, number in sorted(own.items()):
        judged = [line for line, sites in lines.items() if site in sites and sites[site].validation is not None]
        shared = kept_round if kept_round in judged else judged[-1]
        validation = lines[shared][site].validation or Metrics()
        beside = validation.without("evaluate_sec").to_json()
        values = {"round": number, "personal": lines[number][site].personal, "shared_round": shared, "shared": beside}
        found[site] = PersonalComparison.model_validate(values)
    return found


def _fitting(key: str, value: Any) -> Any:
    """The value of a site's report if it is of the kind that `key` asks for, else None; unknown keys are kept as they are."""
    if key in ("found", "used", "patients", "train", "validation"):
        return value if isinstance(value, int) else None
    if key in ("classes", "skipped", "warnings"):
        return {name: n for name, n in value.items() if isinstance(n, int)} if isinstance(value, dict) else None
    if key == "count_noise":
        return value if isinstance(value, int | float) else None
    if key == "withheld":
        return [str(kind) for kind in value] if isinstance(value, list | tuple) else None
    return value
