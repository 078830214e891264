"""A site judges a run's models on its validation patients: the global one, with the sites' own beside it, by itself or with training.

Only sums leave, by the rules of `client.federation.requests` and `client.federation.evaluations`; how validation images score in the
suitability tests (`common.model_bundle.pooled_scores`) leaves by the same.

    evaluate_round(instruction, config, policy)            a message of its own; in secure aggregation a sum of its own
    judge_before_training(instruction, config, policy)     with `evaluation.with_training`: the model that a training message brings
    would_judge(...)                                       before a sum under masks: whether the site has statistics to add
    judge_under_masks(...)                                 with `evaluation.with_training`, where updates are summed under masks

The models that sites train by themselves are judged in `client.federation.alone`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from pneumofed.client.federation.ditto import PersonalModels
from pneumofed.client.federation.evaluations import admit_evaluation, coarsen
from pneumofed.client.federation.network import network_with, own_network
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.requests import (
    Disclosure,
    admit,
    open_site_data,
    record_not_judged,
    rule_against_statistics,
)
from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.client.secure_aggregation.participant import MaskPlan, masking
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import EmptySiteError, MessageError, PolicyError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.model_bundle.image_statistics import as_pictures
from pneumofed.common.model_bundle.pooled_scores import SCORE_BINS, count_scores, pack_counts, unpack_counts
from pneumofed.common.model_bundle.suitability import SUITABILITY_TESTS, score_images
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import compute_features, predict_cached
from pneumofed.common.secure_aggregation.protocol import Purpose, pack_masked
from pneumofed.common.secure_aggregation.quantization import encode_scores, encode_statistics
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import Content, Evaluation, pack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout

logger = logging.getLogger(__name__)


def evaluate_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Content:
    """Judges the global model on the site's validation patients; only sums leave (see `common.evaluation.statistics`).

    Args:
        instruction: what the coordinator asks, with the global weights.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Returns:
        Mergeable statistics; those of no image where the policy withholds them; with `personal.method` those of the site's own model
        too, where they may leave. In secure aggregation under masks, and nothing rather than those of no image: who is counted adds
        something.

    Raises:
        PolicyError: too many were asked for, or the answer and an earlier one would tell a few patients apart.
        EmptySiteError: the site has nothing to add to a secure sum.
    """
    if instruction.suitability is not None:
        with masking(instruction, config, policy, "score") as plan:
            return _score_round(instruction, config, policy, plan)
    with masking(instruction, config, policy, "evaluate") as plan:
        if plan is None:
            return pack_evaluation(judge_global(instruction, config, policy))
        found = _judge(instruction, config, policy)
        _require_statistics(found.statistics.n, found.releases)
        vector = encode_statistics(found.statistics)
        plan.hide(vector)
        return pack_masked(found.releases.presence(found.layout.digest), vector)


def judge_global(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Evaluation:
    """Judges the global model on the site's validation patients, and where the run has such models the site's own too.

    Args:
        instruction: what the coordinator asks, with the global weights and the round that they are of.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Raises:
        PolicyError: too many were asked for, or the answer and an earlier one would tell a few patients apart.
    """
    started = time.perf_counter()
    found = _judge(instruction, config, policy)
    personal = None
    if found.releases.shows_personal(instruction.experiment) and not found.releases.withholds("validation_statistics"):
        personal = _personal_statistics(found.site, instruction, config, policy)
    seconds = {"evaluate_sec": time.perf_counter() - started}
    numbers = personal.to_numbers() if personal else None
    presence = found.releases.presence(found.layout.digest)
    return Evaluation(presence, found.statistics.n, seconds, found.statistics.to_numbers(), numbers)


def judge_before_training(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Evaluation | Exception | None:
    """Judges the model that a training message brings, which is that of the round before (`evaluation.with_training`).

    Nothing that fails here costs the site its training.

    Args:
        instruction: to train.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Returns:
        What was found, or why nothing was; None where the round is not to be judged so.
    """
    if not instruction.experiment.judges_in_training(instruction.round):
        return None
    of_former = replace(instruction, round=instruction.round - 1)
    try:
        return judge_global(of_former, config, policy)
    except Exception as error:
        logger.exception("round %d: the model could not be judged", of_former.round)
        record_not_judged(of_former, config, error)
        return error


def would_judge(instruction: Instruction, config: SiteConfig, policy: SitePolicy, purpose: Purpose) -> bool:
    """Finds out, when a secure sum begins, whether this site has statistics to add to it; nothing is counted yet.

    In a sum of updates (`evaluation.with_training`) the vectors of all sites hold statistics or none does: those of a few would be told by
    the sum, as if they were not masked. Nothing that fails here costs the site its training. In a sum of statistics or scores a site that
    has none takes no part: one that refused only after it shared its secrets would count among those who must stay, and a few such sites
    would cost all others their sum, with the answers that they had counted for it.

    Args:
        instruction: the first step of the sum.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        purpose: of the sum.

    Returns:
        Whether it adds statistics of the model that it trains on from: False in sums that hold no updates.

    Raises:
        PolicyError: the sum holds no updates, and the policy lets nothing leave now.
        EmptySiteError: it holds none, and the site has no validation patient.
    """
    if purpose != "train":
        admit(instruction, config, policy, "evaluate")
        if rule := rule_against_statistics(policy):
            raise PolicyError(rule, "validation statistics never leave this site, so it takes no part in their sum")
        _require_statistics(*_admissible(instruction, config, policy, len(SUITABILITY_TESTS) if purpose == "score" else 1))
        return False
    if not instruction.experiment.judges_in_training(instruction.round):
        return False
    of_former = replace(instruction, round=instruction.round - 1)
    try:
        return _admissible(of_former, config, policy)[0] > 0
    except Exception as error:
        logger.exception("round %d: the model is not judged here", of_former.round)
        record_not_judged(of_former, config, error)
        return False


def _admissible(instruction: Instruction, config: SiteConfig, policy: SitePolicy, answers: int = 1) -> tuple[int, Disclosure]:
    """How many validation images so many answers would be about now; none are where the policy withholds their statistics."""
    site = open_site_data(instruction, config, policy, "evaluate")
    releases = Disclosure.of(site, instruction.experiment, policy)
    if releases.withholds("validation_statistics"):
        return 0, releases
    return len(admit_validation(site, instruction, config, policy, answers, counts=False).validation.labels), releases


def _require_statistics(images: int, releases: Disclosure) -> None:
    """Refuses a sum to which the site would add nothing.

    Raises:
        PolicyError, EmptySiteError: why.
    """
    if releases.withholds("validation_statistics"):
        raise PolicyError("min_validation_patients", "too few validation patients for a sum")
    if not images:
        raise EmptySiteError(f"{releases.site.name}: no validation patient for the sum")


def judge_under_masks(instruction: Instruction, config: SiteConfig, policy: SitePolicy, plan: MaskPlan) -> Statistics | None:
    """Judges the model that a training message brings, for the vector of a secure sum; None where the vectors hold no statistics.

    Args:
        instruction: to train.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        plan: of the sum, in which this site said with all others that it would.

    Raises:
        PolicyError: another run was answered since, so that this answer is one too many: the site takes no part in the sum.
        EmptySiteError: no validation patient is left.
    """
    if not plan.judges:
        return None
    statistics = _judge(replace(instruction, round=instruction.round - 1), config, policy).statistics
    if not statistics.n:
        raise EmptySiteError(f"{config.name}: no validation statistics for the sum")
    return statistics


@dataclass(frozen=True)
class _Judgement:
    """Statistics of the global model, coarse, on those of the site's validation patients whom the answer may be about."""

    site: SiteData
    releases: Disclosure
    layout: ArraysLayout
    statistics: Statistics
    """Of no image where the policy withholds them."""


def _judge(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> _Judgement:
    experiment = instruction.experiment
    compute = build_compute(config.device, "fp32", config.threads)
    site = open_site_data(instruction, config, policy, "evaluate")
    model, layout = own_network(instruction, config, norms_before_round=instruction.round + 1)
    releases = Disclosure.of(site, experiment, policy)
    if releases.withholds("validation_statistics"):
        return _Judgement(site, releases, layout, no_statistics(experiment))
    site = admit_validation(site, instruction, config, policy)
    statistics = coarsen(evaluate_model(compute.place(model), site, experiment, compute), policy.score_bins)
    return _Judgement(site, releases, layout, statistics)


def admit_validation(
    site: SiteData, instruction: Instruction, config: SiteConfig, policy: SitePolicy, answers: int = 1, *, counts: bool = True
) -> SiteData:
    """Returns the site with those validation patients whom one more answer may be about, which is counted.

    Args:
        site: the site's data.
        instruction: what the coordinator asks.
        config: the site's own; without a policy all patients are admitted.
        policy: the site's, as it stood when the message came.
        answers: as how many it counts, as `client.federation.evaluations.admit_evaluation` says.
        counts: False only asks.

    Raises:
        PolicyError: none may leave.
    """
    if config.policy is None:
        return site
    request = RunRequest.of(instruction.experiment, "evaluate", instruction.run, instruction.round)
    admitted = admit_evaluation(site.validation, request, policy, Path(config.work_dir), answers=answers, counts=counts)
    return replace(site, validation=admitted)


def _personal_statistics(site: SiteData, instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Statistics | None:
    """Statistics of the site's own model on the patients on whom the global one was judged, as one more answer; None where there is no
    such model yet, or the policy lets no more answers leave: the global model's goes without them."""
    own = PersonalModels.of(config.work_dir, instruction.run).before(instruction.round + 1)
    if own is None or not len(site.validation.labels):
        return None
    try:
        site = admit_validation(site, instruction, config, policy)
    except PolicyError as error:
        logger.info("round %d: nothing of the site's own model leaves (%s)", instruction.round, error)
        return None
    model, _ = network_with(instruction.experiment, own.arrays)
    compute = build_compute(config.device, "fp32", config.threads)
    return coarsen(evaluate_model(compute.place(model), site, instruction.experiment, compute), policy.score_bins)


def _score_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy, plan: MaskPlan | None) -> Content:
    """The network is the bundle's: under FedBN without the site's own normalisation layers."""
    model, layout = network_with(instruction.experiment, instruction.weights)
    answer = count_patients(instruction, config, policy, model, layout.digest)
    if plan is None:
        return pack_evaluation(answer)
    if not answer.num_examples:
        raise EmptySiteError(f"{config.name}: no scores for the sum")
    vector = encode_scores(unpack_counts(answer.statistics, answer.num_examples))
    plan.hide(vector)
    return pack_masked(answer.presence, vector)


def count_patients(
    instruction: Instruction, config: SiteConfig, policy: SitePolicy, model: nn.Module, layout_digest: str
) -> Evaluation:
    """Counts the validation patients by score, one image of each. It is admitted and withheld as an evaluation is, and counts as
    one for each test.

    Args:
        instruction: with the suitability whose densities are asked about.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        model: with the global weights, as the bundle has them.
        layout_digest: of `model`.

    Raises:
        PolicyError: too many were asked for, or the answer and an earlier one would tell a few patients apart.
        MessageError: the densities do not fit the network.
    """
    experiment, suitability = instruction.experiment, instruction.suitability
    if suitability is None:
        raise MessageError("the instruction holds no suitability")
    site = open_site_data(instruction, config, policy, "evaluate")
    releases = Disclosure.of(site, experiment, policy)
    presence, counts = releases.presence(layout_digest), np.zeros((len(SUITABILITY_TESTS), SCORE_BINS), np.int64)
    if not releases.withholds("validation_statistics") and len(site.validation.labels):
        site = admit_validation(site, instruction, config, policy, len(SUITABILITY_TESTS))
        first = {patient: row for row, patient in reversed(list(enumerate(site.validation.patients)))}
        chosen = site.validation.subset(sorted(first.values()))
        compute = build_compute(config.device, "fp32", config.threads)
        features = compute_features(compute.place(model), chosen, compute, experiment.model.in_channels)
        if suitability.features.mean.shape != (features.shape[1],):
            raise MessageError("the suitability is of another network")
        counts = count_scores(score_images(suitability, as_pictures(np.asarray(chosen.pixels)), features))
    return Evaluation(presence, int(counts[0].sum()), {}, pack_counts(counts))


def evaluate_model(model: nn.Module, site: SiteData, experiment: ExperimentConfig, compute: Compute) -> Statistics:
    """Computes mergeable statistics of `model` on the site's validation patients; those of nothing where it has none.

    Args:
        model: on the device.
        site: the site's data.
        experiment: decides the task and how images are prepared.
        compute: device and precision.
    """
    if not len(site.validation.labels):
        return no_statistics(experiment)
    probabilities = predict_cached(model, site.validation, compute, experiment, site.cache_dir)
    return Statistics.of(Predictions(probabilities, site.validation.labels, site.validation.patients), FEDERATED_GRID)


def no_statistics(experiment: ExperimentConfig) -> Statistics:
    """Builds the statistics of no image, which are sent where nothing may be judged."""
    return Statistics.zero(class_number(experiment), FEDERATED_GRID)
