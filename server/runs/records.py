"""What is kept of a run, as typed records: one `RoundRecord` a line of history.jsonl, one `RunSummary` in summary.json.

History, summary, audit line, live page, report and baselines are written from these records; the keys of JSON stand only here.

    RoundRecord.model_validate(values)       the record; a metric that is NaN or infinite becomes None, as JSON's null
    record.to_json()                         plain values for JSON: a key that was never given stays absent
    parse_record(RoundRecord, content, ...)  the record in a file, of any version so far; `format_record` puts the schema number in front

Keys that this version does not know are kept through reading and writing. Files of a version without schema number are read as schema 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pneumofed.common.errors import CheckpointError
from pneumofed.common.evaluation.metrics import without_nan

SCHEMA = 1
"""Raised when a key changes its meaning or goes away; a new key needs no new number. 0: files of versions that wrote no number."""
SCHEMA_KEY = "schema"
CENTRAL_SETS = ("test", "external")
"""Held-out sets with a name of their own in every file; a run may have others, under `held_out`."""
SET_NOUNS = {"test": "test set", "external": "external set"}
T = TypeVar("T")


def set_noun(name: str) -> str:
    """Names a held-out set in a sentence: `test set`, `external set`, or `set of adults`."""
    return SET_NOUNS.get(name, f"{name} set")


def by_field(results: Mapping[str, T]) -> dict[str, Any]:
    """Sorts results by set into the fields of a record: `test` and `external`, and all others under `held_out`."""
    own = {name: results[name] for name in CENTRAL_SETS if name in results}
    others = {name: found for name, found in results.items() if name not in CENTRAL_SETS}
    return {**own, "held_out": others} if others else own


def by_set(test: T | None, external: T | None, held_out: Mapping[str, T]) -> dict[str, T]:
    """Lists the results that there are by set, `test` and `external` first: the other way of `by_field`."""
    own = {"test": test, "external": external}
    return {**{name: found for name, found in own.items() if found is not None}, **held_out}


class RunState(StrEnum):
    """Of a run. The last three are final: only `Registry.resume` leads out of `failed` and `stopped`, nothing out of `succeeded`."""

    SUBMITTED = "submitted"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def final(self) -> bool:
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED)


class Record(BaseModel):
    """Values that never change. What is not known is None, and absent in JSON unless it was given as None."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nan(cls, values: object) -> object:
        return without_nan(values)

    def to_json(self) -> dict[str, Any]:
        """Converts to plain values for JSON: what was given, in the order of the fields, unknown keys last."""
        # A NaN can only stand in a record that was made without validation; JSON knows none.
        return dict(without_nan(self.model_dump(exclude_unset=True)))  # type: ignore[call-overload]

    def updated(self, **changes: Any) -> Self:
        """Copies the record with `changes`, which are validated."""
        given = {name: value for name, value in self if name in self.model_fields_set}
        return self.model_validate({**given, **changes})

    def without(self, *names: str) -> Self:
        """Copies the record as if `names` were never given."""
        return self.model_validate({name: value for name, value in self if name in self.model_fields_set - set(names)})


R = TypeVar("R", bound=Record)


class Metrics(Record):
    """Metrics of one set of images, as `common.evaluation.metrics.metrics` counts them; None where a metric is undefined.

    More than two classes add `auroc_class_0`, `sensitivity_class_0`, `specificity_class_0`, ... as further keys.
    """

    n: int | None = None
    """Images."""
    n_positive: int | None = None
    """Images with pneumonia."""
    tn: int | None = None
    fp: int | None = None
    fn: int | None = None
    tp: int | None = None
    threshold: float | None = None
    """An image is called pneumonia if its probability reaches it."""
    auroc: float | None = None
    """In [0, 1], as all below but `mcc`, which is in [-1, 1], and `log_loss`, which has no upper end."""
    average_precision: float | None = None
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    precision: float | None = None
    f1: float | None = None
    mcc: float | None = None
    brier: float | None = None
    ece: float | None = None
    log_loss: float | None = None
    accuracy_three_class: float | None = None
    auroc_macro: float | None = None
    sensitivity_macro: float | None = None


class StoredThreshold(Record):
    """A `common.evaluation.metrics.ChosenThreshold`; sensitivity and specificity are those on the validation images."""

    value: float
    policy: str | None = None
    reason_of_fallback: str | None = None
    """Why the value is 0.5 in spite of the policy."""
    sensitivity: float | None = None
    specificity: float | None = None


class SiteTraining(Record):
    """A site's own numbers of its training in one round; which of them leave the site is for its policy to say."""

    num_examples: int | None = None
    """Training images, 1 at least."""
    train_loss: float | None = None
    """Mean over images and passes."""
    train_accuracy: float | None = None
    steps: float | None = None
    """Steps of the optimizer."""
    learning_rate: float | None = None
    train_sec: float | None = None
    images_per_sec: float | None = None
    epsilon: float | None = None
    """Spent in this run so far, by the site's own ledger."""
    noise_multiplier: float | None = None
    summed: bool | None = None
    """True where the site is in a secure sum, which shows no site's own numbers."""

    @classmethod
    def of(cls, num_examples: int, reported: Mapping[str, float]) -> SiteTraining:
        """Builds the record; what the coordinator knows itself (`num_examples`, `summed`) comes before what the site reports,
        which may be anything.

        Args:
            num_examples: training images, as the update's weight.
            reported: the site's own metrics by name.
        """
        own = {name: value for name, value in reported.items() if name not in ("num_examples", "summed")}
        return cls.model_validate({"num_examples": num_examples, **own})


class SiteValidation(Metrics):
    """Metrics on a site's own validation images."""

    evaluate_sec: float | None = None

    @classmethod
    def of(cls, counted: Mapping[str, float], reported: Mapping[str, float]) -> SiteValidation:
        """Builds the record; what the coordinator counted comes before what the site reports.

        Args:
            counted: metrics of the site's validation statistics.
            reported: the site's own metrics by name.
        """
        return cls.model_validate({**reported, **counted})


class SiteRound(Record):
    """A site's part in a round: absent are what it did not take part in."""

    train: SiteTraining | None = None
    validation: SiteValidation | None = None
    personal: Metrics | None = None
    """Of the site's own model (`personal.method`) on the same images, at the global model's threshold."""


class LateReply(Record):
    """A reply to an earlier round that arrived in this one and was dropped."""

    site: str
    round: int
    task: str


class SecureSumRecord(Record):
    """A secure sum: names and stages, and for training what the sums show of all sites together."""

    summed: tuple[str, ...] = ()
    dropped: Mapping[str, str] = {}
    """Site -> the stage in which it gave no good answer; it may be in `summed` all the same."""
    images: int | None = None
    classes: tuple[int, ...] | None = None
    """Training images by class."""
    clipped: int | None = None
    """Values that met their bound."""
    train_loss: float | None = None
    train_accuracy: float | None = None
    error_bound: float | None = None
    """Of a weight, from quantisation."""


class RoundSeconds(Record):
    """Wall time of a round's parts in seconds."""

    train: float | None = None
    aggregate: float | None = None
    evaluate: float | None = None
    central: float | None = None
    total: float | None = None


class RoundBytes(Record):
    """Bytes of weights that travelled, to the sites and from them."""

    down: int = 0
    up: int = 0


class RoundRecord(Record):
    """One completed round."""

    round: int
    """From 1."""
    drawn: tuple[str, ...] = ()
    """Sites that were asked to train; in an asynchronous round all that were at work in it."""
    failures: Mapping[str, str] = {}
    """Site -> why it gave no answer, in training or evaluation."""
    left_out: Mapping[str, str] = {}
    """Site -> why its update did not pass the checks."""
    late: tuple[LateReply, ...] = ()
    threshold: StoredThreshold | None = None
    validation: Metrics | None = None
    """On the sites' pooled validation images."""
    test: Metrics | None = None
    external: Metrics | None = None
    held_out: Mapping[str, Metrics] = {}
    """By name, of the other held-out sets."""
    secure_sum: SecureSumRecord | None = None
    central_epsilon: float | None = None
    """Spent by the coordinator's noise so far."""
    rate_factor: float | None = None
    """On the learning rate of the round, under the schedule `plateau`."""
    secure_validation: SecureSumRecord | None = None
    judged_later: bool | None = None
    """True until the next round's training brings what the sites say of this round's model (`evaluation.with_training`)."""
    staleness: Mapping[str, int] = {}
    """Of an asynchronous round (`strategy.buffer`): site -> rounds between the weights that it trained from and those that its update was
    applied to."""
    simulated_time: float | None = None
    """When the round was over by the virtual clock of a simulation, in trainings of a hospital that is not slow."""
    sites: Mapping[str, SiteRound] = {}
    absent: Mapping[str, str] = {}
    """Site or node -> why it is not a site of the run."""
    seconds: RoundSeconds = RoundSeconds()
    bytes: RoundBytes = RoundBytes()

    @property
    def trained(self) -> list[str]:
        """Sites whose training counts."""
        return [name for name, site in self.sites.items() if site.train is not None]

    @property
    def trouble(self) -> dict[str, str]:
        """Reason by site of everyone who gave no answer or no good one."""
        return {**self.failures, **self.left_out}

    @property
    def stale(self) -> dict[str, int]:
        """Staleness by site of the updates that began from older weights than the round's."""
        return {name: rounds for name, rounds in self.staleness.items() if rounds}

    @property
    def measured(self) -> dict[str, Metrics]:
        """Metrics by set of those that were evaluated: `validation`, `test`, `external`, then the named ones."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return validation | by_set(self.test, self.external, self.held_out)

    @property
    def mean_train_loss(self) -> float | None:
        """Mean training loss over the sites that reported theirs, weighted by their images; None where none did."""
        trained = [site.train for site in self.sites.values() if site.train]
        known = [(one.num_examples, one.train_loss) for one in trained if one.num_examples and one.train_loss is not None]
        return sum(loss * images for images, loss in known) / sum(images for images, _ in known) if known else None

    @property
    def epsilons(self) -> dict[str, float]:
        """Epsilon by site of those that reported theirs."""
        return {name: site.train.epsilon for name, site in self.sites.items() if site.train and site.train.epsilon is not None}

    def unjudged(self) -> RoundRecord:
        """Copies the record as it was before anybody judged the round's model, which is to be judged again."""
        sites = {name: site.without("validation", "personal") for name, site in self.sites.items() if site.train is not None}
        judged = (*CENTRAL_SETS, "threshold", "validation", "held_out", "secure_validation")
        return self.without(*judged).updated(sites=sites, judged_later=True)

    def central(self, name: str) -> Metrics | None:
        """Metrics on the central set `name`; None where it was not evaluated in this round."""
        return by_set(self.test, self.external, self.held_out).get(name)


def parse_record(kind: type[R], content: object, where: str) -> R:
    """Reads the record in the JSON value `content`.

    Args:
        kind: class of the record.
        content: what a file holds, of this version or an earlier one.
        where: the file, for the error's sentence.

    Raises:
        CheckpointError: the file is of a newer version, or its values are not what they should be.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{where} is damaged: expected a JSON object, got {type(content).__name__}; restore it from a backup"
        )
    schema = content.get(SCHEMA_KEY, 0)
    if type(schema) is not int or not 0 <= schema <= SCHEMA:
        raise CheckpointError(
            f"{where} has schema {str(schema)[:20]}, and this version of pneumofed reads up to {SCHEMA}: it was written by a newer "
            "version; install that version or a newer one"
        )
    try:
        return kind.model_validate({key: value for key, value in content.items() if key != SCHEMA_KEY})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where} is damaged: {key}: {first['msg']}; restore it from a backup") from None


def format_record(record: Record) -> dict[str, Any]:
    """Converts a record into plain values for a JSON file, the schema number first."""
    return {SCHEMA_KEY: SCHEMA, **record.to_json()}
