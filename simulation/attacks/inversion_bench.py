"""Gradient inversion on the attack bench: the same images, as the server observes them under each protection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.evaluation.similarity import ssim
from pneumofed.common.imaging.augment import to_model_input
from pneumofed.common.models.build import build_model
from pneumofed.common.models.recipe import build_loss
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.simulation.attacks.bench import Bench, Say
from pneumofed.simulation.attacks.inversion import (
    Gradients,
    Images,
    InversionSettings,
    Target,
    correlations,
    infer_label,
    masked_view,
    match,
    private_view,
    psnr,
    ranks,
    reconstruct,
)
from pneumofed.simulation.attacks.membership import Share, clopper_pearson
from pneumofed.simulation.attacks.victims import plan_of, run_all

PLAIN_VIEW, PRIVATE_VIEW, MEAN_VIEW, MASKED_VIEW = "plain", "private", "mean", "masked"
"""What the server sees of a step: its gradient, that of DP-SGD, the mean over sites of one image each, or one masked vector."""


@dataclass(frozen=True)
class InversionProblem:
    """One gradient to invert, with all that decides what the server sees; plain numbers, to cross processes.

    Attributes:
        view: `plain`, `mean` (over sites of one image each), `masked`, or `private`.
        experiment: gives the model, whose first weights the server knows.
        images: float32 [B, 1, S, S] in [0, 1].
        labels: int64 [B].
        noise_multiplier: of `private`.
        settings: how hard the attacker tries.
        seed: of the attacker's random images.
    """

    view: str
    experiment: ExperimentConfig
    images: Tensor
    labels: Tensor
    noise_multiplier: float
    settings: InversionSettings
    seed: int


@dataclass(frozen=True)
class Inversion:
    """The measured success of the attack on one view.

    Attributes:
        view: as in `InversionProblem`.
        epsilon: of a private view; infinity for the others.
        reconstructions: float64 [A, S, S] in [0, 1], one for each image that the attack was after.
        psnr: mean over images, in dB.
        ssim: mean over images.
        correlation: mean with the true image.
        others: mean over images of the largest correlation with any other image of the site.
        identified: how many reconstructions correlate more with the true image than with any other of the site.
        candidates: how many images there are.
        labels: how many labels were inferred correctly; None where they were given.
    """

    view: str
    epsilon: float
    reconstructions: Images
    psnr: float
    ssim: float
    correlation: float
    others: float
    identified: Share
    candidates: int
    labels: Share | None


def attack_gradients(bench: Bench, say: Say) -> tuple[Images, list[Inversion]]:
    """Inverts the gradients of `bench.cfg.images` images under each protection.

    Args:
        bench: gives the images, the model and the epsilons.
        say: takes a sentence for each view.

    Returns:
        The attacked images, float64 [A, S, S] in [0, 1], and one result for each view of their gradients.

    Raises:
        ValueError: the site has fewer patients than images are asked for.
    """
    rows = _choose(bench)
    images, labels = to_model_input(bench.site.pixels[rows]), torch.from_numpy(bench.site.labels[rows])
    candidates = to_model_input(np.asarray(bench.site.pixels))[:, 0].double().numpy()
    views = [(view, epsilon, _problems(bench, view, epsilon, images, labels)) for view, epsilon in _views(bench)]
    solved = run_all(solve, [problem for _, _, problems in views for problem in problems], bench.cfg.workers)
    return candidates[rows], [
        _measure(view, epsilon, [next(solved) for _ in problems], (candidates, rows, labels.numpy()), say)
        for view, epsilon, problems in views
    ]


def solve(problem: InversionProblem) -> tuple[np.ndarray, int | None]:
    """Reconstructs the images of one problem.

    Returns:
        The images, float64 [B, S, S] in [0, 1], and the inferred label of a single image; None for a batch, whose labels are given.
    """
    torch.set_num_threads(1)
    target = target_of(problem.experiment)
    observed = observe(target, problem)
    if len(problem.labels) > 1:
        return reconstruct(target, observed, problem.labels, problem.settings, problem.seed)[:, 0].double().numpy(), None
    label = infer_label(target, observed)
    found = reconstruct(target, observed, torch.tensor([label]), problem.settings, problem.seed)
    return found[:, 0].double().numpy(), label


def target_of(experiment: ExperimentConfig) -> Target:
    """Builds the attacked model with its first weights, and its loss for a site whose classes are even.

    A BatchNorm uses its running statistics and is not trained, so that images do not mix and private training allows it.
    """
    model = build_model(experiment.model.without_weights(), experiment.task, derive_seed(experiment.seed, "initial weights"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    loss = build_loss(experiment.loss, [1] * len(classes_of(experiment.task)))
    return Target(model.eval(), loss, experiment.image.size_px, experiment.model.in_channels)


def observe(target: Target, problem: InversionProblem) -> Gradients:
    """Computes what the server sees of a training step.

    Args:
        target: model and loss of the step.
        problem: the step's images and labels, and the protection (`view`).
    """
    if problem.view == PRIVATE_VIEW:
        clip, noise = problem.experiment.privacy.max_grad_norm, problem.noise_multiplier
        return private_view(target, problem.images, problem.labels, (clip, noise), problem.seed)
    gradients = target.gradients(problem.images, problem.labels)
    return masked_view(gradients, problem.seed) if problem.view == MASKED_VIEW else gradients


def _views(bench: Bench) -> Iterator[tuple[str, float]]:
    yield PLAIN_VIEW, math.inf
    yield from ((PRIVATE_VIEW, epsilon) for epsilon in bench.epsilons if not math.isinf(epsilon))
    yield MEAN_VIEW, math.inf
    yield MASKED_VIEW, math.inf


def _choose(bench: Bench) -> np.ndarray:
    """Rows of the first images of so many random patients of the site, int64."""
    _, first = np.unique(np.asarray(bench.site.patients), return_index=True)
    if len(first) < bench.cfg.images:
        raise ValueError(f"{bench.cfg.images} images of as many patients are asked for, the site has {len(first)}")
    return np.sort(numpy_generator(bench.cfg.seed, "attacked images").choice(first, bench.cfg.images, replace=False))


def _problems(bench: Bench, view: str, epsilon: float, images: Tensor, labels: Tensor) -> list[InversionProblem]:
    cfg, experiment = bench.cfg, bench.at(epsilon)
    if cfg.fixed_norms:
        experiment = experiment.model_copy(update={"model": experiment.model.model_copy(update={"norm": "batch"})})
    noise = plan_of(experiment, bench.site).noise_multiplier if view == PRIVATE_VIEW else 0.0
    settings = InversionSettings(cfg.iterations, cfg.restarts, total_variation=cfg.total_variation)
    parts = [slice(None)] if view == MEAN_VIEW else [slice(row, row + 1) for row in range(len(images))]
    return [
        InversionProblem(view, experiment, images[part], labels[part], noise, settings, derive_seed(cfg.seed, view, number))
        for number, part in enumerate(parts)
    ]


def _measure(
    view: str,
    epsilon: float,
    solved: list[tuple[np.ndarray, int | None]],
    truth: tuple[Images, np.ndarray, np.ndarray],
    say: Say,
) -> Inversion:
    candidates, rows, labels = truth
    images = candidates[rows]
    found = np.concatenate([reconstructions for reconstructions, _ in solved])
    found = found[match(found, images)] if view == MEAN_VIEW else found
    alike = correlations(found, candidates)
    places = ranks(alike, rows)
    own = alike[np.arange(len(rows)), rows].copy()
    alike[np.arange(len(rows)), rows] = -1.0
    inferred = [label == truth_ for (_, label), truth_ in zip(solved, labels.tolist(), strict=False)]
    say(
        f"inversion: {view}{'' if math.isinf(epsilon) else f' at epsilon {epsilon:g}'}, {(places == 1).sum()} of {len(rows)} identified"
    )
    return Inversion(
        view,
        epsilon,
        found,
        float(np.mean([psnr(a, b) for a, b in zip(found, images, strict=True)])),
        float(np.mean([ssim(a, b) for a, b in zip(found, images, strict=True)])),
        float(own.mean()),
        float(alike.max(axis=1).mean()),
        clopper_pearson(int((places == 1).sum()), len(rows)),
        len(candidates),
        None if view == MEAN_VIEW else clopper_pearson(sum(inferred), len(inferred)),
    )
