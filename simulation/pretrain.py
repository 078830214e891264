"""Pretraining on drawn pictures: first weights that need no download and have seen no patient, and so cost no privacy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import OnProgress, atomic_write, count_off, tell_nobody
from pneumofed.common.imaging.images import fit_square
from pneumofed.common.models.architectures import architecture_of, build_architecture
from pneumofed.common.models.build import set_trainable
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.recipe import refuse_plateau
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.simulation.phantoms.other_images import PROCESSES, draw_process, draw_process_picture
from pneumofed.simulation.phantoms.phantom import LABEL_SHARES, draw_patients, draw_picture
from pneumofed.simulation.plan import PretrainSource

PRETRAINING = "pretraining"
"""The split that phantoms are drawn for, and the site that trains; stands in the seeds of both."""
_SMALLEST_PHANTOM_PX = 64
_VERSION = 1
"""To be raised whenever the pictures or the way of training change."""


def pretrain_network(
    source: PretrainSource,
    experiment: ExperimentConfig,
    images: int,
    out: Path,
    say: Callable[[str], None],
    progress: Progress = NO_PROGRESS,
) -> dict[str, Any]:
    """Trains the network of an experiment on drawn pictures and writes its weights.

    The network learns to distinguish the classes of the pictures: for `phantoms` the three labels that a phantom patient is drawn with,
    for `random-processes` which of `PROCESSES` processes made the picture. Model, image size, augmentation, training and seed are the
    experiment's, and one of its rounds is one pass over the pictures, whatever `training.local_epochs` and `local_steps` say; the loop
    is that of the sites. The first weights are random, whatever `model.weights` says.

    `out` holds `state_dict`, without the classifier, and `provenance`; `model.weights` takes it (see `common.models.build`).

    Guarantees:
        Reads no file, and so depends on no patient's image.
        Pure in the arguments on one machine with one number of threads.

    Args:
        source: the kind of pictures.
        experiment: the recipe.
        images: number of pictures; at least one for each class.
        out: file of the weights, replaced if it exists.
        say: takes a sentence after each pass.
        progress: shows the pictures drawn and the passes.

    Returns:
        The provenance: source, seed, number and hash of the pictures, last accuracy, experiment.

    Raises:
        ConfigError: fewer pictures than classes, a network that has only a classifier to train, or a schedule that needs validation.
        OSError: `out` cannot be written.
    """
    refuse_plateau(experiment, "pretraining")
    once = experiment.training.model_copy(update={"local_epochs": 1, "local_steps": None})
    experiment = experiment.model_copy(update={"training": once})
    classes = len(LABEL_SHARES) if source == "phantoms" else PROCESSES
    if images < classes:
        raise ConfigError(f"images: expected at least {classes}, one of each class of {source}, got {images}")
    model = _build(experiment, classes)
    data = draw_pictures(source, images, experiment.image.size_px, experiment.seed, progress.show)
    accuracy = _train(model, data, experiment, say, progress)
    head = f"{architecture_of(model).head}."
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items() if not name.startswith(head)}
    provenance = {
        "source": source,
        "version": _VERSION,
        "seed": experiment.seed,
        "images": images,
        "images_sha256": hashlib.sha256(np.ascontiguousarray(data.pixels).tobytes()).hexdigest(),
        "epochs": experiment.rounds,
        "last_epoch_accuracy": accuracy,
        "experiment": experiment.model_dump_json(),
    }
    with atomic_write(out) as file:
        torch.save({"state_dict": state, "provenance": provenance}, file)
    return provenance


def draw_pictures(source: PretrainSource, images: int, size_px: int, seed: int, on_progress: OnProgress = tell_nobody) -> Dataset:
    """Draws pictures with their classes; pure in the arguments.

    Args:
        source: the kind of pictures.
        images: how many, N.
        size_px: side of the square, S.
        seed: of all that is drawn.
        on_progress: told of each picture.

    Returns:
        A data set of uint8 [N, S, S], in which each picture is a patient of its own.
    """
    draw = _draw_phantoms if source == "phantoms" else _draw_processes
    pixels, labels = np.empty((images, size_px, size_px), dtype=np.uint8), np.empty(images, dtype=np.int64)
    for row, (picture, label) in enumerate(count_off(draw(images, size_px, seed), "pictures drawn", images, on_progress)):
        pixels[row], labels[row] = np.rint(picture * 255.0).astype(np.uint8), label
    names = tuple(str(number) for number in range(images))
    return Dataset(pixels, labels, names, names, DataReport())


def _draw_phantoms(images: int, size_px: int, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """One picture of each of `images` patients, in [0, 1]: a second one of the same chest would teach less."""
    classes = list(LABEL_SHARES)
    for patient in draw_patients(PRETRAINING, images, seed):
        picture = draw_picture(patient, 1, PRETRAINING, seed, max(size_px, _SMALLEST_PHANTOM_PX))
        yield fit_square(picture, size_px, "pad"), classes.index(patient.label)


def _draw_processes(images: int, size_px: int, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    processes = [draw_process(number, seed) for number in range(PROCESSES)]
    rng = numpy_generator("random process pictures", seed)
    for number in range(images):
        yield draw_process_picture(processes[number % PROCESSES], size_px, rng), number % PROCESSES


def _build(experiment: ExperimentConfig, classes: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(experiment.seed, "initial weights"))
        model = build_architecture(experiment.model, classes)
    if set_trainable(model, "none") == set_trainable(model, "head_only"):
        raise ConfigError(
            f"model.name {experiment.model.name} has only a classifier to train; there is nothing to learn beforehand"
        )
    return model


def _train(
    model: torch.nn.Module, data: Dataset, experiment: ExperimentConfig, say: Callable[[str], None], progress: Progress
) -> float:
    """Accuracy in the last round of so many as the experiment has."""
    counts, compute = np.bincount(data.labels).tolist(), build_compute("auto", experiment.training.precision)
    accuracy = 0.0
    for number in range(1, experiment.rounds + 1):
        progress.show("training", number - 1, experiment.rounds, f"pass {number} of {experiment.rounds}")
        plan = RoundPlan(experiment, number, PRETRAINING)
        result = train_locally(build_setup(model, counts, plan, compute), data, plan)
        accuracy = result.accuracy
        say(f"pass {number} of {experiment.rounds}: loss {result.loss:.3f}, accuracy {accuracy:.3f}, {result.duration_sec:.0f} s")
    return accuracy
