"""The models that are attacked, trained by the hospitals' own training code on images that the attacker may not have.

With `others` a victim is the model that a federation releases: each round every hospital trains from the global weights, and the
coordinator's own strategy combines them. All models of one experiment start from the same weights, as those of a federation do: the
attacker knows them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from torch import nn

from pneumofed.client.federation.training import RoundPlan, TrainingSetup, build_setup, choose_examples, train_locally
from pneumofed.client.privacy.dp_sgd import PrivateRound, build_private_setup
from pneumofed.client.privacy.plan import SitePlan, count_units
from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.model_bundle.bundle import read_start_weights
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import predict_cached
from pneumofed.common.models.recipe import gradient_weight, rate_of_round, refuse_plateau
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.study_code import known_codes, remember_all
from pneumofed.common.privacy.randomness import KEY_BYTES
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.common.wire.messages import ModelArrays, Presence, Update, pack_arrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.strategies import aggregate, build_strategy
from pneumofed.simulation.local_grid import LocalGrid

logging.getLogger("flwr").setLevel(logging.WARNING)  # it logs each round of each victim

J = TypeVar("J")
R = TypeVar("R")
Margins = npt.NDArray[np.float64]

_SMALLEST_PROBABILITY = 1e-300


@dataclass(frozen=True)
class Victim:
    """One model to train, and the images whose confidence the attacker asks it for.

    Attributes:
        name: stands in the seeds, so that victims of different names draw differently.
        experiment: the recipe; private where its `privacy.mechanism` says so.
        train: the attacked site's training images.
        asked: the images that the attacker shows to the model.
        cache_dir: where features of images are kept, for networks of which only the classifier is trained.
        others: training images of the federation's other hospitals; none where the attacked site trains by itself.
    """

    name: str
    experiment: ExperimentConfig
    train: Dataset
    asked: Dataset
    cache_dir: Path
    others: tuple[Dataset, ...] = ()


def plan_of(experiment: ExperimentConfig, data: Dataset) -> SitePlan:
    """Computes the private plan of a site that trains on `data`: sampling rate, steps and noise.

    Args:
        experiment: a private one.
        data: the site's training images; the number of its units and patients decides.

    Raises:
        ConfigError: the experiment is not private, or `data` holds fewer than two patients.
    """
    return SitePlan.of(experiment, count_units(data.patients, experiment.privacy.unit), len(set(data.patients)))


def margins_of(victim: Victim) -> Margins:
    """Trains the victim and computes its margins on `victim.asked`; pure in `victim` on one machine.

    The margin is the logit of the confidence in the true class, log(p / (1 - p)) (Carlini et al. 2022, section V-B).

    Returns:
        float64 [N].

    Raises:
        ConfigError: training diverged, or the model cannot be trained privately.
    """
    compute = build_compute("auto", victim.experiment.training.precision, threads=1)
    model = train_victim(victim, compute)
    cfg = victim.experiment
    probabilities = predict_cached(model, victim.asked, compute, cfg, victim.cache_dir / "asked")
    if not np.isfinite(probabilities).all():
        raise ConfigError("training of the model to attack diverged; lower training.learning_rate")
    return margins(probabilities, victim.asked.labels)


def margins(probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> Margins:
    """Computes log(p / (1 - p)) of the true class; 1 - p is summed from the other classes.

    A difference 1 - p would round the most confident images, which disclose most about members, to infinity.

    Args:
        probabilities: float64 [N, C], each row sums to 1.
        labels: int64 [N], the true classes.

    Returns:
        float64 [N], finite.
    """
    rows = np.arange(len(labels))
    true = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = 0.0
    return np.log(true.clip(_SMALLEST_PROBABILITY)) - np.log(others.sum(axis=1).clip(_SMALLEST_PROBABILITY))


def train_victim(victim: Victim, compute: Compute) -> nn.Module:
    """Trains the model that is attacked, over all rounds of its experiment.

    Args:
        victim: with `others` the model is the global one under the experiment's strategy; else of `victim.train` only.
        compute: device and precision of the training.

    Raises:
        ConfigError: the model cannot be trained privately, or the schedule needs validation.
    """
    experiment = victim.experiment
    refuse_plateau(experiment, "the training of an attacked model")
    seed, weights = derive_seed(experiment.seed, "initial weights"), read_start_weights(experiment.model)
    model = build_model(experiment.model, experiment.task, seed, weights=weights)
    course = partial(rate_of_round, experiment), partial(gradient_weight, experiment)
    layout, strategy = ArraysLayout.of(model), build_strategy(experiment.strategy, *course)
    unused_grid = LocalGrid(ClientApp(), [], {})  # the strategy's signature needs a grid; the sites are trained here
    arrays = ModelArrays(*layout.flatten(model))
    for number in range(1, experiment.rounds + 1):
        updates = list(_visit_sites(model, arrays, victim, number, compute))
        if victim.others:
            list(strategy.configure_train(number, pack_arrays(arrays), ConfigRecord(), unused_grid))
            arrays = aggregate(strategy, number, updates)
        else:
            arrays = updates[0].arrays
    layout.load(model, arrays.parameters, arrays.statistics)
    return model


def run_all(function: Callable[[J], R], jobs: Sequence[J], workers: int = 0) -> Iterator[R]:
    """Runs `function` on each job, in as many processes as asked for.

    Args:
        function: of one job; it must be importable by name where there are several processes.
        jobs: pickled on their way to a process.
        workers: number of processes; 0 is one a CPU, 1 stays in this one.

    Returns:
        The results, in the order of `jobs`, as they come.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    spawned = partial(ProcessPoolExecutor, workers, mp_context=get_context("spawn"))
    with children_end_with_me(), spawned(initializer=remember_all, initargs=(known_codes(),)) as pool:
        yield from pool.map(function, jobs)


def _visit_sites(model: nn.Module, arrays: ModelArrays, victim: Victim, number: int, compute: Compute) -> Iterator[Update]:
    """What each site sends in round `number`, the attacked one first."""
    layout = ArraysLayout.of(model)
    for site, data in enumerate((victim.train, *victim.others)):
        layout.load(model, arrays.parameters, arrays.statistics)
        name = f"{victim.name}/{site}" if site else victim.name
        setup, plan = _set_up(model, victim.experiment, data, RoundPlan(victim.experiment, number, name), compute)
        train_locally(setup, choose_examples(setup.model, data, plan, compute, victim.cache_dir / str(site)), plan)
        yield Update.of(Presence(name, layout.digest), ModelArrays(*layout.flatten(model)), len(data), {})


def _set_up(
    model: nn.Module, experiment: ExperimentConfig, data: Dataset, plan: RoundPlan, compute: Compute
) -> tuple[TrainingSetup, RoundPlan]:
    if experiment.privacy.mechanism == "none":
        counts = np.bincount(data.labels, minlength=len(classes_of(experiment.task)))
        return build_setup(model, counts.tolist(), plan, compute), plan
    key = numpy_generator(*plan.seed_parts(), "noise of a victim").bytes(KEY_BYTES)
    private = PrivateRound.of(plan_of(experiment, data), data, key, secure=experiment.privacy.secure_noise)
    plan = private.hide(plan)
    return build_private_setup(model, private, plan, compute), plan
