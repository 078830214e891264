"""What a site judges on its validation patients beside a run's global model: the model that it would have without the others, and those of
the others.

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

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pneumofed.client.federation.evaluations import admit_evaluation, coarsen
from pneumofed.client.federation.judging import admit_validation, evaluate_model, no_statistics
from pneumofed.client.federation.network import network_with, own_network
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.requests import Disclosure, open_site_data
from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.client.federation.training import RoundPlan, build_setup, choose_examples, train_locally
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import EmptySiteError, MessageError
from pneumofed.common.evaluation.metrics import FALLBACK_THRESHOLD, metrics
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.models.build import build_empty
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.kept_model import JudgedRound, choose_round, moving_average
from pneumofed.common.models.recipe import plateau_factor
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import Content, Evaluation, ModelArrays, pack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout


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
        if not experiment.validates(number):  # as at the coordinator, so that rates fall and rounds are chosen by the same rule
            monitored.append(None)
            done(number)
            continue
        layout.load(judged, average.parameters, average.statistics)
        statistics = evaluate_model(exact.place(judged), site, experiment, exact)
        found = metrics(statistics, FALLBACK_THRESHOLD)
        monitored.append(found["log_loss" if experiment.training.plateau.monitor == "loss" else "auroc"])
        rounds.append(JudgedRound(number, found["auroc"], statistics.n_positive, statistics.n - statistics.n_positive))
        if choose_round(rounds) == number:  # one that was chosen is given up only for a later one, so that one is kept at a time
            best = AloneModel(number, average, statistics)
        done(number)
    assert best is not None  # the last round is judged, and the first that is is the best so far
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
    presence = releases.presence(layout.digest)
    if not releases.shows_unnoised(experiment) or not len(site.validation.labels):
        return pack_evaluation(Evaluation(presence, 0, {}, no_statistics(experiment).to_numbers()))
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
    statistics = no_statistics(experiment)
    if not releases.withholds("validation_statistics"):
        compute = build_compute(config.device, "fp32", config.threads)
        site = admit_validation(site, instruction, config, policy)
        statistics = coarsen(evaluate_model(compute.place(model), site, experiment, compute), policy.score_bins)
    spent = {"evaluate_sec": time.perf_counter() - started}
    return pack_evaluation(Evaluation(releases.presence(layout.digest), statistics.n, spent, statistics.to_numbers()))
