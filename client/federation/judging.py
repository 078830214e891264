"""A site judges models on its validation patients: the global one, its own beside it, and the one that it would have without the others.

Only sums leave, by the rules of `client.federation.requests` and `client.federation.evaluations`; how validation images score in the
suitability tests (`common.model_bundle.pooled_scores`) leaves by the same.

    model = train_alone(site, experiment, first, done)     the run's whole budget on the site's own training images
    compare_alone(instruction, config, policy)             that model and the global one on the site's validation patients
    evaluate_other(instruction, config, policy, other)     the model that another site trained so, on this site's validation patients

The model of a hospital by itself starts from the weights that the run started from, and trains as many rounds of as many passes by the same
schedule, with the site's own seeds of each round. Which round's weights it keeps, and whether it is their moving average, it decides as the
coordinator does, on its own validation images. What a strategy adds to the mean over sites is left out, since nothing is averaged over
sites; in a private run there is no noise, since there the model leaves nobody's house. It does only with `evaluation.cross_site`, which no
private run may have, and `share_own_model` in the policy. Pure in (images, experiment, first weights): the same call
gives the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from pneumofed.client.federation.ditto import PersonalModels
from pneumofed.client.federation.evaluations import admit_evaluation, coarsen
from pneumofed.client.federation.network import network_with, own_network
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.requests import Disclosure, open_site_data
from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.client.federation.training import RoundPlan, build_setup, choose_examples, train_locally
from pneumofed.client.secure_aggregation.participant import MaskPlan, masking
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import EmptySiteError, MessageError, PolicyError
from pneumofed.common.evaluation.metrics import FALLBACK_THRESHOLD, metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.model_bundle.image_statistics import as_pictures
from pneumofed.common.model_bundle.pooled_scores import SCORE_BINS, count_scores, pack_counts, unpack_counts
from pneumofed.common.model_bundle.suitability import SUITABILITY_TESTS, score_images
from pneumofed.common.models.build import build_empty
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import compute_features, predict_cached
from pneumofed.common.models.kept_model import JudgedRound, choose_round, moving_average
from pneumofed.common.models.recipe import plateau_factor
from pneumofed.common.secure_aggregation.protocol import pack_masked
from pneumofed.common.secure_aggregation.quantization import encode_scores, encode_statistics
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import Content, Evaluation, ModelArrays, pack_evaluation
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
        return _evaluate_round(instruction, config, policy, plan)


def _evaluate_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy, plan: MaskPlan | None) -> Content:
    started = time.perf_counter()
    experiment = instruction.experiment
    compute = build_compute(config.device, "fp32", config.threads)
    site = open_site_data(instruction, config, policy, "evaluate")
    model, layout = own_network(instruction, config, norms_before_round=instruction.round + 1)
    releases = Disclosure.of(site, experiment, policy)
    statistics = _no_statistics(experiment)  # what is sent where nothing may be judged
    personal = None
    if not releases.withholds("validation_statistics"):
        site = _admitted(site, instruction, config, policy)
        statistics = coarsen(evaluate_model(compute.place(model), site, experiment, compute), policy.score_bins)
        if plan is None and releases.shows_personal(experiment):
            personal = _personal_statistics(site, instruction, config, policy, compute)
    presence = releases.presence(layout.digest)
    if plan is not None:
        if releases.withholds("validation_statistics"):
            raise PolicyError("min_validation_patients", "too few validation patients for a sum")
        if not statistics.n:
            raise EmptySiteError(f"{site.name}: no validation statistics for the sum")
        vector = encode_statistics(statistics)
        plan.hide(vector)
        return pack_masked(presence, vector)
    metrics = {"evaluate_sec": time.perf_counter() - started}
    numbers = personal.to_numbers() if personal else None
    return pack_evaluation(Evaluation(presence, statistics.n, metrics, statistics.to_numbers(), numbers))


def _admitted(site: SiteData, instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> SiteData:
    """The site with those validation patients whom one more answer may be about; the answer is counted.

    Raises:
        PolicyError: none may leave.
    """
    if config.policy is None:
        return site
    request = RunRequest.of(instruction.experiment, "evaluate", instruction.run, instruction.round)
    return replace(site, validation=admit_evaluation(site.validation, request, policy, Path(config.work_dir)))


def _personal_statistics(
    site: SiteData, instruction: Instruction, config: SiteConfig, policy: SitePolicy, compute: Compute
) -> Statistics | None:
    """Statistics of the site's own model on the patients on whom the global one was judged, as one more answer; None where there is no
    such model yet, or the policy lets no more answers leave: the global model's goes without them."""
    own = PersonalModels.of(config.work_dir, instruction.run).before(instruction.round + 1)
    if own is None or not len(site.validation.labels):
        return None
    try:
        site = _admitted(site, instruction, config, policy)
    except PolicyError as error:
        logger.info("round %d: nothing of the site's own model leaves (%s)", instruction.round, error)
        return None
    model, _ = network_with(instruction.experiment, own.arrays)
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
        if config.policy is not None:
            request = RunRequest.of(experiment, "evaluate", instruction.run, instruction.round)
            tests = len(SUITABILITY_TESTS)
            admitted = admit_evaluation(site.validation, request, policy, Path(config.work_dir), answers=tests)
            site = replace(site, validation=admitted)
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
        return _no_statistics(experiment)
    probabilities = predict_cached(model, site.validation, compute, experiment, site.cache_dir)
    return Statistics.of(Predictions(probabilities, site.validation.labels, site.validation.patients), FEDERATED_GRID)


def _no_statistics(experiment: ExperimentConfig) -> Statistics:
    return Statistics.zero(class_number(experiment), FEDERATED_GRID)


@dataclass(frozen=True)
class AloneModel:
    """What a hospital's training by itself gave.

    Attributes:
        round: whose weights were kept.
        arrays: the weights.
        statistics: of these weights on the site's validation images, on `FEDERATED_GRID`.
    """

    round: int
    arrays: ModelArrays
    statistics: Statistics


def train_alone(
    site: SiteData, experiment: ExperimentConfig, first: ModelArrays, done: Callable[[int], None] = lambda number: None
) -> AloneModel:
    """Trains a model on the site's training images only, over all rounds of the experiment.

    Args:
        site: the site's data.
        experiment: the recipe.
        first: the weights that the run started from.
        done: is called with the number of each round as it ends.

    Raises:
        MessageError: `first` is of another network.
    """
    compute = build_compute(site.config.device, experiment.training.precision, site.config.threads)
    exact = build_compute(site.config.device, "fp32", site.config.threads)
    model, judged = (build_empty(experiment.model, experiment.task) for _ in range(2))
    layout = ArraysLayout.of(model)
    layout.load(model, first.parameters, first.statistics)
    average: ModelArrays | None = None
    best: AloneModel | None = None
    rounds: list[JudgedRound] = []
    monitored: list[float | None] = []
    for number in range(1, experiment.rounds + 1):
        plan = RoundPlan(experiment, number, site.name, rate_factor=plateau_factor(experiment.training, monitored))
        setup = build_setup(model, site.class_counts(class_number(experiment)), plan, compute)
        train_locally(setup, choose_examples(setup.model, site.train, plan, compute, site.cache_dir), plan)
        average = moving_average(average, ModelArrays(*layout.flatten(model)), experiment.strategy.ema_decay)
        layout.load(judged, average.parameters, average.statistics)
        statistics = evaluate_model(exact.place(judged), site, experiment, exact)
        found = metrics(statistics, FALLBACK_THRESHOLD)
        monitored.append(found["log_loss" if experiment.training.plateau.monitor == "loss" else "auroc"])
        rounds.append(JudgedRound(number, found["auroc"], statistics.n_positive, statistics.n - statistics.n_positive))
        if choose_round(rounds) == number:  # one that was chosen is given up only for a later one, so that one is kept at a time
            best = AloneModel(number, average, statistics)
        done(number)
    assert best is not None  # an experiment has a round, and the first is the best so far
    return best


def compare_alone(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> Content:
    """Trains alone and judges this model and the global one on the same validation patients. Only sums leave, as two evaluations, and
    the own model where the run asks for it and the policy gives it (`Disclosure.shares_own_model`).

    Both answers are counted before anything is trained. The own model stays in memory and is gone with the answer.

    Args:
        instruction: with the global weights and those that the run began with.
        config: the site's own.
        policy: the site's, as it stood when the message came; whether it allows this was decided on arrival.

    Raises:
        PolicyError: too many were asked for, or the answers and an earlier one would tell a few patients apart.
        EmptySiteError: the site has no training image.
        MessageError: the instruction lacks weights, or they are of another network.
    """
    experiment, first = instruction.experiment, instruction.first
    if first is None:
        raise MessageError("the instruction holds no first weights")
    started = time.perf_counter()
    site = open_site_data(instruction, config, policy, "evaluate")
    if not len(site.train.labels):
        raise EmptySiteError(f"{site.name}: no training image")
    model, layout = own_network(instruction, config, norms_before_round=instruction.round + 1)
    releases = Disclosure.of(site, experiment, policy)
    presence, nothing = releases.presence(layout.digest), Statistics.zero(class_number(experiment), FEDERATED_GRID)
    if not releases.shows_unnoised(experiment) or not len(site.validation.labels):
        return pack_evaluation(Evaluation(presence, 0, {}, nothing.to_numbers()))
    judged = site
    if config.policy is not None:
        request = RunRequest.of(experiment, "evaluate", instruction.run, instruction.round, alone=True)
        admitted = admit_evaluation(site.validation, request, policy, Path(config.work_dir), answers=2)
        judged = replace(site, validation=admitted)
    compute = build_compute(config.device, "fp32", config.threads)
    shared = coarsen(evaluate_model(compute.place(model), judged, experiment, compute), policy.score_bins)
    kept = train_alone(site, experiment, first).arrays
    own_model, _ = network_with(experiment, kept)
    own = coarsen(evaluate_model(compute.place(own_model), judged, experiment, compute), policy.score_bins)
    spent = {"evaluate_sec": time.perf_counter() - started}
    answer = Evaluation(presence, shared.n, spent, shared.to_numbers(), own.to_numbers())
    return pack_evaluation(answer, kept if releases.shares_own_model(experiment) else None)


def evaluate_other(instruction: Instruction, config: SiteConfig, policy: SitePolicy, other: ModelArrays) -> Content:
    """Judges the model of another site on the validation patients, as one evaluation like any other; the model is not kept here.

    It is judged as it was given: under FedBN with the normalisation layers of the site that trained it.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        other: the model. Whose it is, the message does not say.

    Returns:
        Mergeable statistics; those of no image where the policy withholds them.

    Raises:
        PolicyError: too many were asked for, or the answer and an earlier one would tell a few patients apart.
        MessageError: the model is of another network.
    """
    experiment, started = instruction.experiment, time.perf_counter()
    site = open_site_data(instruction, config, policy, "evaluate")
    model, layout = network_with(experiment, other)
    releases = Disclosure.of(site, experiment, policy)
    statistics = _no_statistics(experiment)
    if not releases.withholds("validation_statistics"):
        compute = build_compute(config.device, "fp32", config.threads)
        site = _admitted(site, instruction, config, policy)
        statistics = coarsen(evaluate_model(compute.place(model), site, experiment, compute), policy.score_bins)
    spent = {"evaluate_sec": time.perf_counter() - started}
    return pack_evaluation(Evaluation(releases.presence(layout.digest), statistics.n, spent, statistics.to_numbers()))
