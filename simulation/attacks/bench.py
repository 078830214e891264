"""The attack bench: membership inference and canaries against the same training with and without privacy.

It trains its own models, as a simulated hospital would, on images of a public set that lies on this machine or on phantoms. No real
hospital's update is ever attacked by it. Gradient inversion on the same bench is `inversion_bench`; `report.run_attacks` runs all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.config.choices import CORRECTED
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import default_delta
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.manifest import Manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.errors import ConfigError
from pneumofed.common.evaluation.bootstrap import Bootstrap
from pneumofed.common.privacy.accounting import epsilon as accounted_epsilon
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.simulation.attacks.canaries import audit, make_canaries, toss
from pneumofed.simulation.attacks.membership import (
    MembershipResult,
    by_patient,
    draw_halves,
    judge_scores,
    lira_scores,
    loss_scores,
)
from pneumofed.simulation.attacks.settings import AttackConfig, at_epsilon
from pneumofed.simulation.attacks.victims import Margins, Victim, margins_of, plan_of, run_all
from pneumofed.simulation.phantoms.image import is_phantom
from pneumofed.simulation.phantoms.phantom import MIN_SIZE_PX, write_phantoms

Say = Callable[[str], None]

AUDIT_DELTA = 1.0e-5
"""A delta at which a hundred canaries can show something: 2 m delta is 0.002."""


@dataclass(frozen=True)
class Bench:
    """What all attacks share.

    Attributes:
        cfg: sizes.
        experiment: the recipe that is attacked; its privacy is set for each epsilon.
        epsilons: from large to small; infinity is no privacy.
        site: the attacked site's images.
        spare: images of patients whom the site does not have.
        others: images of each other hospital of the federation.
        phantom: whether all of them were drawn.
        cache_dir: where victims keep features of images.
    """

    cfg: AttackConfig
    experiment: ExperimentConfig
    epsilons: tuple[float, ...]
    site: Dataset
    spare: Dataset
    others: tuple[Dataset, ...]
    phantom: bool
    cache_dir: Path

    def at(self, epsilon: float) -> ExperimentConfig:
        """Returns the attacked experiment with the target `epsilon`."""
        return at_epsilon(self.experiment, epsilon)


@dataclass(frozen=True)
class Membership:
    """The membership attacks at one epsilon.

    Attributes:
        epsilon: asked for; infinity is no privacy.
        plan: of one model; None without privacy.
        attacks: verdict of each attack.
        accuracy: shares of images whose true class gets more than half of the confidence, of members and of others.
    """

    epsilon: float
    plan: SitePlan | None
    attacks: dict[str, MembershipResult]
    accuracy: dict[str, float]


def build_bench(cfg: AttackConfig, experiment: ExperimentConfig, epsilons: Sequence[float], out: Path) -> Bench:
    """Builds a bench: reads or draws its images, and deals the patients to the attacked site, the canaries and the other hospitals.

    Args:
        cfg: sizes, and the data folder if there is one.
        experiment: the recipe that is attacked; decides image size and classes.
        epsilons: targets to compare, from large to small; infinity is no privacy.
        out: receives the decoded images, the feature cache and the phantoms that are drawn where `cfg` names no data.

    Raises:
        ConfigError: the data hold too few patients, or the experiment's federation releases no single model.
    """
    if cfg.hospitals > 1 and experiment.strategy.name == "fedbn":
        raise ConfigError("under FedBN each hospital keeps a model of its own: attack one of them with hospitals=1")
    if cfg.hospitals > 1 and experiment.strategy.name in CORRECTED:
        raise ConfigError(
            f"under {experiment.strategy.name} hospitals keep corrections, which an attack's trainings do not: take fedavg"
        )
    manifest, phantom = _find_data(cfg, experiment.image.size_px, out)
    patients = sorted(set(manifest.patients))
    if len(patients) < cfg.all_patients:
        raise ConfigError(
            f"{cfg.hospitals} hospitals of {cfg.patients} patients and {cfg.canaries} canaries are asked for, the data hold "
            f"{len(patients)} patients; take fewer"
        )
    order = numpy_generator(cfg.seed, "attacked patients").permutation(len(patients))
    chosen = [patients[position] for position in order[: cfg.all_patients]]
    spare_end = cfg.patients + cfg.canaries
    parts = {"site": chosen[: cfg.patients], "spare": chosen[cfg.patients : spare_end]}
    for number, start in enumerate(range(spare_end, cfg.all_patients, cfg.patients), start=1):
        parts[f"other-{number}"] = chosen[start : start + cfg.patients]
    site, spare, *others = (_load(manifest, set(part), experiment, out / name) for name, part in parts.items())
    return Bench(cfg, experiment, tuple(epsilons), site, spare, tuple(others), phantom, out / "cache")


def attack_membership(bench: Bench, say: Say) -> list[Membership]:
    """Runs the loss attack and LiRA at each epsilon, on models of random halves of the site's patients.

    Args:
        bench: the site and the recipe; `bench.cfg.models` models are trained for each epsilon.
        say: takes a sentence each time the models of an epsilon are trained.

    Returns:
        One result for each of `bench.epsilons`, in their order.

    Raises:
        ConfigError: training diverged, or the model cannot be trained privately.
    """
    names = sorted(set(bench.site.patients))
    members = draw_halves(bench.cfg.models, len(names), bench.cfg.seed)
    owner = np.searchsorted(names, np.asarray(bench.site.patients))
    halves = [bench.site.subset(np.flatnonzero(row[owner])) for row in members]
    jobs = [_half_victim(bench, epsilon, number, half) for epsilon in bench.epsilons for number, half in enumerate(halves)]
    margins: list[Margins] = []
    for number, found in enumerate(run_all(margins_of, jobs, bench.cfg.workers), start=1):
        margins.append(found)
        if number % len(halves) == 0:
            say(f"membership: {number} of {len(jobs)} models trained")
    stacked = np.stack(margins).reshape(len(bench.epsilons), len(halves), -1)
    of_images = members[:, owner]
    return [
        Membership(
            epsilon,
            None if math.isinf(epsilon) else plan_of(bench.at(epsilon), halves[0]),
            _judge(part, members, bench),
            {"members": float((part > 0)[of_images].mean()), "others": float((part > 0)[~of_images].mean())},
        )
        for epsilon, part in zip(bench.epsilons, stacked, strict=True)
    ]


def attack_canaries(bench: Bench, say: Say) -> list[dict[str, Any]]:
    """Measures a lower bound on epsilon beside the accountant's upper bound, with one model for each epsilon, at two deltas.

    At a run's own delta, one over its patients, a hundred canaries can hardly show anything: 2 m delta is about 1 (see `p_value`). The
    same run has an epsilon at every delta, a larger one at a smaller delta, and both bounds are also taken at `AUDIT_DELTA`.

    Args:
        bench: its spare patients become the canaries.
        say: takes a sentence with both bounds for each epsilon and delta.

    Returns:
        Two rows for each of `bench.epsilons`, with the keys `epsilon` (asked for), `delta`, `lower`, `upper` and `guesses`.

    Raises:
        ConfigError: too few spare patients, training diverged, or the model cannot be trained privately.
    """
    cfg = bench.cfg
    canaries = make_canaries(bench.spare, cfg.canary_kind, bench.experiment.task, cfg.canaries, cfg.seed)
    included = toss(cfg.canaries, cfg.seed)
    train = Dataset.join([bench.site, canaries.subset(np.flatnonzero(included))])
    jobs = [Victim("canaries", bench.at(epsilon), train, canaries, bench.cache_dir, bench.others) for epsilon in bench.epsilons]
    rows = []
    for epsilon, scores in zip(bench.epsilons, run_all(margins_of, jobs, cfg.workers), strict=True):
        plan = None if math.isinf(epsilon) else plan_of(bench.at(epsilon), train)
        run_delta = plan.delta if plan else bench.experiment.privacy.delta or default_delta(len(set(train.patients)))
        for delta in (run_delta, AUDIT_DELTA):
            found, upper = audit(scores, included, delta), _accounted(plan, delta)
            row = {"epsilon": epsilon, "delta": delta, "lower": found.epsilon, "upper": upper, "guesses": vars(found.guesses)}
            rows.append(row)
            say(f"canaries: {epsilon:g} asked for; at delta {delta:.1e} at least {found.epsilon:.2f}, at most {upper:.2f}")
    return rows


def _accounted(plan: SitePlan | None, delta: float) -> float:
    """Epsilon at `delta` of all rounds of `plan`."""
    return accounted_epsilon([plan.round_mechanism()] * plan.rounds, delta, plan.accountant) if plan else math.inf


def _half_victim(bench: Bench, epsilon: float, number: int, half: Dataset) -> Victim:
    return Victim(f"half-{number}", bench.at(epsilon), half, bench.site, bench.cache_dir, bench.others)


def _judge(margins: Margins, members: np.ndarray, bench: Bench) -> dict[str, MembershipResult]:
    evaluation = bench.experiment.evaluation
    bootstrap = Bootstrap(
        evaluation.bootstrap_samples, evaluation.confidence, derive_seed(bench.cfg.seed, "bootstrap of the attack")
    )
    of_patients, _ = by_patient(margins, bench.site.patients)
    losses, _ = by_patient(loss_scores(margins), bench.site.patients)
    scores = {"loss": losses, "lira": lira_scores(of_patients, members)}
    return {name: judge_scores(found, members, bootstrap) for name, found in scores.items()}


def _find_data(cfg: AttackConfig, size_px: int, out: Path) -> tuple[Manifest, bool]:
    if cfg.data:
        return read_kaggle(Path(cfg.data))[0], is_phantom(Path(cfg.data))
    return write_phantoms(out / "phantoms", cfg.all_patients, cfg.seed, max(size_px, MIN_SIZE_PX)), True


def _load(manifest: Manifest, patients: set[str], experiment: ExperimentConfig, cache: Path) -> Dataset:
    rows = [row for row, patient in enumerate(manifest.patients) if patient in patients]
    return load_dataset(manifest.subset(rows), experiment.task, experiment.image, cache)
