"""What sites reply, checked before any arithmetic, and what the replies of one round gave together.

checks.take(site, message)      an update: form, sizes, finite values, counts, and a plausible length beside the others'
judging.take(site, message)     statistics of an evaluation; take_attached those that came with an update

`TrainingOutcome` and `EvaluationOutcome` are what the replies gave, whichever way they came: one by one, or as a secure sum
(`server.secure_aggregation.rounds`). A bad reply is a failure with its site's name and never an exception.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig, StrategyConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.wire.messages import (
    Evaluation,
    Failure,
    ModelArrays,
    Presence,
    Update,
    unpack_attached,
    unpack_evaluation,
    unpack_update,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout, TensorKind
from pneumofed.server.federation.strategies import squared_length
from pneumofed.server.federation.update_spool import UpdateSpool
from pneumofed.server.runs.records import SecureSumRecord, SiteTraining

logger = logging.getLogger(__name__)

BLOCK = 1 << 18
"""Values that are subtracted at once where two models are compared; they stay in the processor's cache."""

Evaluations = dict[str, tuple[Evaluation, Statistics]]
"""By site: what it said of itself, and its statistics."""


def read_personal(evaluation: Evaluation, shared: Statistics) -> Statistics | None:
    """Reads the statistics of a site's own model; None where it sent none.

    Args:
        evaluation: the site's answer.
        shared: those of the global model.

    Raises:
        MessageError: they are none, or of other images than the global model's.
    """
    if evaluation.personal is None:
        return None
    own = Statistics.from_numbers(evaluation.personal, shared.classes)
    if not np.array_equal(own.confusion.sum(axis=1), shared.confusion.sum(axis=1)):
        raise MessageError("the statistics of the site's own model are of other images than those of the global one")
    return own


@dataclass
class TrainingOutcome:
    """What the strategy aggregates, and what the history records of it."""

    updates: list[Update]
    """Those of the sites; only one, the mean over all sites, where they come as a secure sum."""
    sites: dict[str, SiteTraining]
    """By site: what is known of its own training."""
    heads: dict[str, str]
    bytes_up: int
    left_out: Mapping[str, Failure]
    failures: Mapping[str, Failure]
    secure_sum: SecureSumRecord | None = None
    central_epsilon: float | None = None
    staleness: Mapping[str, int] | None = None
    """By site, of the update, in asynchronous rounds only."""
    simulated_time: float | None = None
    judged: EvaluationOutcome | None = None
    """What came with the updates of the model that the sites trained on from (`evaluation.with_training`)."""


@dataclass
class EvaluationOutcome:
    """The sites' validation statistics, pooled and, where they are known, each site's own."""

    pooled: Statistics
    evaluations: Evaluations
    failures: Mapping[str, Failure]
    secure_validation: SecureSumRecord | None = None
    personal: Mapping[str, Statistics] = field(default_factory=dict)
    """By site: statistics of its own model, on the same images as the global one's."""


@dataclass
class EvaluationChecks:
    """Checks the sites' statistics of one model as they arrive."""

    classes: int
    personal_too: bool
    """Whether the sites' own models are judged beside it."""
    good: Evaluations = field(default_factory=dict)
    bad: dict[str, Failure] = field(default_factory=dict)
    personal: dict[str, Statistics] = field(default_factory=dict)

    @classmethod
    def of(cls, experiment: ExperimentConfig) -> EvaluationChecks:
        """Builds the checks of what `experiment` asks for."""
        return cls(len(classes_of(experiment.task)), experiment.personal.is_on)

    def take(self, site: str, message: Message, read: Callable[[RecordDict], Evaluation] = unpack_evaluation) -> bool:
        """Takes the statistics of one reply, and says whether they are good.

        Args:
            site: who was asked.
            message: its reply. A bad one is noted in `bad`; nothing is raised.
            read: finds the evaluation in it.
        """
        try:
            evaluation = read(message.content)
            statistics = Statistics.from_numbers(evaluation.statistics, self.classes)
            if self.personal_too and (own := read_personal(evaluation, statistics)) is not None:
                self.personal[site] = own
            self.good[site] = evaluation, statistics
        except MessageError as error:
            self.bad[site] = Failure(site, "MessageError", str(error))
        return site in self.good

    def take_attached(self, site: str, message: Message) -> None:
        """Takes what came with an update.

        Args:
            site: who was asked to train.
            message: its reply.
        """
        try:
            found = unpack_attached(message.content, site)
        except MessageError as error:
            found = Failure(site, "MessageError", str(error))
        if isinstance(found, Failure):
            self.bad[site] = found
        else:
            self.take(site, message, lambda _: found)

    def close(self, silent: Mapping[str, Failure], number: int) -> EvaluationOutcome:
        """Pools the good ones and logs why the others are missing.

        Args:
            silent: by site, why it sent nothing at all.
            number: the round whose model was judged.
        """
        failures = {**self.bad, **silent}
        for site, failure in failures.items():
            logger.warning("round %d: %s did not evaluate: %s", number, site, failure)
        pooled = sum((statistics for _, statistics in self.good.values()), Statistics.zero(self.classes, FEDERATED_GRID))
        return EvaluationOutcome(pooled, dict(sorted(self.good.items())), failures, personal=self.personal)


@dataclass
class UpdateChecks:
    """Checks the replies of one round as they arrive. Of each good one it keeps the weights, in `spool`, and the update's length.

    checks.take(site, message)      one reply
    checks.close()                  (good updates, the reason for each one left out), both by site
    """

    current: ModelArrays
    layout: ArraysLayout
    presences: Mapping[str, Presence]
    cfg: StrategyConfig
    compares: bool = True
    """Whether an update is left out for its length beside the others'. Under central privacy none is: no site may decide on another."""
    spool: UpdateSpool = field(default_factory=lambda: UpdateSpool(None))
    updates: dict[str, Update] = field(default_factory=dict)
    left_out: dict[str, Failure] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)

    def take(self, site: str, message: Message, base: ModelArrays | None = None, scale: float = 1.0) -> bool:
        """Checks one reply and keeps its update; says whether it is good as far as one can say without the others.

        Args:
            site: who was asked.
            message: its reply. A bad one is noted in `left_out`; nothing is raised.
            base: the weights that it was asked to train from; None: `current`.
            scale: what the update's length is multiplied by before it is compared.
        """
        base = self.current if base is None else base
        try:
            update = unpack_update(message.content, base, self.cfg.update_precision)
            arrays = update.arrays
            _check_form(site, update, arrays, self.layout, self.presences[site])
        except MessageError as error:
            self.left_out[site] = Failure(site, "MessageError", str(error))
            return False
        self.updates[site] = self.spool.keep(update)
        self.lengths[site] = scale * distance_between(arrays.parameters, base.parameters)
        return True

    def close(self) -> tuple[dict[str, Update], dict[str, Failure]]:
        """Compares the lengths of all updates and returns the good ones and the reason for each one left out, both by site."""
        lengths = {site: (length, self.updates[site].num_examples) for site, length in self.lengths.items()}
        too_long = implausible(lengths, self.cfg.max_update_norm_factor) if self.compares else {}  # of those there are so far
        left_out = {**self.left_out, **{site: Failure(site, "MessageError", reason) for site, reason in too_long.items()}}
        good = {site: update for site, update in sorted(self.updates.items()) if site not in left_out}
        return good, dict(sorted(left_out.items()))


def distance_between(first: np.ndarray, second: np.ndarray) -> float:
    """Euclidean distance of two float32 vectors of one length, a block at a time, so that the difference needs no memory of their size."""
    blocks = range(0, len(first), BLOCK)
    return math.sqrt(sum(squared_length(first[at : at + BLOCK] - second[at : at + BLOCK]) for at in blocks))


def implausible(updates: Mapping[str, tuple[float, int]], factor: float) -> dict[str, str]:
    """Finds the sites whose update is too long beside the others', each with the sentence that says so.

    The length is taken per square root of the number of images: a site with a hundred times the images takes a hundred times the
    steps, and its update grows with them. It is compared with the lower median of the round, which an attacker moves only where
    at least half of the sites are with him. Updates of length zero are plausible.

    Args:
        updates: by site, the length of its update and its number of images.
        factor: how many times the round's median a length may be.
    """
    lengths = {site: length / max(images, 1) ** 0.5 for site, (length, images) in updates.items()}
    if len(lengths) < 2:
        return {}
    median = sorted(lengths.values())[(len(lengths) - 1) // 2]
    limit = factor * median
    return {
        site: f"its update is {length / median:.3g} times as long as the round's median, the limit is {factor:g}"
        for site, length in lengths.items()
        if median > 0 and length > limit
    }


def _check_form(site: str, update: Update, arrays: ModelArrays, layout: ArraysLayout, presence: Presence) -> None:
    if update.presence.site != site:
        raise MessageError("the reply names another site")
    if update.presence.layout != layout.digest:
        raise MessageError("the reply's model has another layout")
    check_values(arrays, layout)
    announced = int(presence.report.get("train", 0))
    if not 0 < update.num_examples <= announced:
        raise MessageError(f"trained on {update.num_examples} images but announced {announced}")


def check_values(arrays: ModelArrays, layout: ArraysLayout) -> None:
    """Does nothing where weights that a site sent are a model of `layout` with which one can compute.

    Args:
        arrays: float32 vectors of any length.
        layout: of the run's network.

    Raises:
        MessageError: another number of values, values that are not finite, or a running variance below zero.
    """
    parameters, statistics = arrays.parameters, arrays.statistics
    if len(parameters) != layout.parameter_count or len(statistics) != layout.statistic_count:
        raise MessageError(
            f"expected {layout.parameter_count} parameters and {layout.statistic_count} statistics, "
            f"got {len(parameters)} and {len(statistics)}"
        )
    kinds: tuple[tuple[TensorKind, np.ndarray], ...] = (("parameter", parameters), ("statistic", statistics))
    for kind, values in kinds:
        finite = np.isfinite(values)
        if not finite.all():
            where = layout.name_at(kind, int(np.argmin(finite)))
            raise MessageError(f"{int((~finite).sum())} values are not finite, the first in {where}")
    if (statistics[layout.variances] < 0).any():
        raise MessageError("a running variance is negative")
