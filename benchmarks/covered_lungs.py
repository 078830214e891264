"""What a network looks at: AUROC with the lungs covered, everything but the lungs covered, borders and markers covered.

    python -m benchmarks.covered_lungs --data chest_xray --external adults=nih_chest_xray14 --out runs/covered
    python -m benchmarks.covered_lungs ... --features scattering            frozen features and a logistic regression: minutes
    python -m benchmarks.covered_lungs ... --reduce augmentation.style=0.5  a further network, trained with these settings
    python -m benchmarks.covered_lungs --run RUN --out runs/covered          a run's model on the run's held-out sets

Trained is on train/ of --data, with the recipe of --config and --set for `rounds` passes over all images in one place; the last weights
count, so nothing is chosen on a held-out set. Held-out sets: test/ of --data and each --external. Four tables: a model trained and
tested under each cover; the model of uncovered images tested under each cover; the effect of --reduce on uncovered images; and how well a
linear classifier on frozen features of the covered images tells each set from the others (five folds by patient; in part by the shares
of ill people, in which sets differ). Intervals: 95 %, bootstrap over patients. Differences are paired. With --run nothing is trained and
there is one table: the run's kept weights under each cover.

Every line is of the same images: those whose outline is usable (`inference.explain.covers.is_usable`); how many are not is printed first,
by class. How good outlines are, `benchmarks.lung_outlines` measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import nn

from benchmarks.lung_outlines import named_source
from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.classes import class_index
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.config.parties import CoordinatorConfig, central_manifests
from pneumofed.common.config.reader import build_config, load_experiment, merge, parse_overrides, read_yaml
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport, ImageRecord, read_manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.errors import ImageError
from pneumofed.common.evaluation.bootstrap import Bootstrap, ConfidenceInterval, bootstrap, bootstrap_difference
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.imaging.images import decoder_version, fit_square, read_image
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import compute_features, predict_probabilities
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.inference.explain.covers import COVERS, Cover, apply_cover, find_place, is_usable
from pneumofed.inference.explain.focus import find_lungs, find_markers
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.simulation.hospitals.sources import read_source

TRAIN, TEST = "train", "test"
LEAST_KEPT = {"markers": 0.95}
"""Share of a pixel of the square that stays uncovered, below which it counts as covered; letters are thin. Half for the others."""
INVERSE_PENALTY = 20.0
"""C of the logistic regression on features of unit length, as in `benchmarks.private_features`."""
MOST_OF_A_SET = 500
"""Images of each set for telling sets apart."""

Scored = dict[str, Predictions]


@dataclass(frozen=True)
class Outlined:
    """Images of one set whose outline is usable, as the network sees them, and what each cover blackens."""

    squares: NDArray[np.uint8]
    places: Mapping[Cover, NDArray[np.uint8]]
    """By cover, bits [N, S, S / 8] of `numpy.packbits`."""
    labels: NDArray[np.int64]
    patients: tuple[str, ...]
    found: tuple[int, int]
    """Normal images and those of pneumonia before outlines were asked for."""

    def covered(self, cover: Cover) -> Dataset:
        """The images under `cover`, in the same order."""
        side = self.squares.shape[-1]
        place = np.unpackbits(self.places[cover], axis=-1, count=side).astype(bool)
        names = tuple(map(str, range(len(self.labels))))
        return Dataset(apply_cover(cover, self.squares, place), self.labels, self.patients, names, DataReport())

    def some(self, rows: NDArray[np.int64]) -> Outlined:
        """The images at `rows`."""
        places = {cover: place[rows] for cover, place in self.places.items()}
        return Outlined(self.squares[rows], places, self.labels[rows], tuple(self.patients[row] for row in rows), self.found)


def outline_set(name: str, records: Sequence[ImageRecord], experiment: ExperimentConfig, options: argparse.Namespace) -> Outlined:
    """Finds the places in the images of `records`, or takes them from `--out`, where they were kept for the same files and size."""
    image = experiment.image
    rows = [row for row, record in enumerate(records) if class_index(record.label, "binary") is not None]
    rows = sorted(numpy_generator("covered lungs", name, options.seed).permutation(rows)[: options.images])
    chosen = [records[row] for row in rows]
    facts = [(str(record.path), record.path.stat().st_mtime_ns, record.label, record.patient) for record in chosen]
    # Whoever changes how places are found raises the number.
    key = hashlib.sha256(json.dumps([1, decoder_version(), image.size_px, image.fit, facts]).encode()).hexdigest()[:16]
    file = options.out / f"places-{name}-{key}.npz"
    if not file.is_file():
        work = [(str(record.path), image.size_px, image.fit) for record in chosen]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(_outline, work, chunksize=16))
        used = np.array([result is not None for result in results])
        squares = [result[0] for result in results if result is not None]
        places = {cover: [result[1][cover] for result in results if result is not None] for cover in COVERS}
        if not squares:
            raise SystemExit(f"{name}: no image has a usable outline of the lungs")
        arrays: dict[str, Any] = {cover: np.stack(bits) for cover, bits in places.items()}
        np.savez_compressed(file, used=used, squares=np.stack(squares), **arrays)
    with np.load(file) as kept:
        used, squares_kept = kept["used"], kept["squares"]
        all_places: dict[Cover, NDArray[np.uint8]] = {cover: kept[cover] for cover in COVERS}
    good = [record for record, is_used in zip(chosen, used, strict=True) if is_used]
    every, labels = (np.array([class_index(record.label, "binary") for record in some], np.int64) for some in (chosen, good))
    normal = int((every == 0).sum())
    patients = tuple(f"{name}/{record.patient}" for record in good)
    return Outlined(squares_kept, all_places, labels, patients, (normal, len(every) - normal))


def _outline(work: tuple[str, int, str]) -> tuple[NDArray[np.uint8], dict[Cover, NDArray[np.uint8]]] | None:
    path, size_px, fit = work
    try:
        pixels = read_image(path).pixels
    except ImageError:
        return None
    lungs = find_lungs(pixels)
    if not is_usable(lungs):
        return None
    marks, places = find_markers(pixels), {}
    for cover in COVERS:
        left = fit_square(
            (~find_place(cover, lungs.lungs, marks)).astype(np.float32), size_px, "crop" if fit == "crop" else "pad"
        )
        places[cover] = np.packbits(left < LEAST_KEPT.get(cover, 0.5), axis=-1)  # padding counts as covered: it is black
    square = fit_square(pixels, size_px, "crop" if fit == "crop" else "pad")
    return np.rint(square * 255.0).astype(np.uint8), places


class Trained:
    """A way from images to scores: a network trained on them, or a linear classifier on frozen features."""

    def __init__(self, train: Dataset, experiment: ExperimentConfig, features: ModelConfig | None, device: str) -> None:
        self.experiment, self.cfg = experiment, features
        self.compute = build_compute(device, experiment.training.precision)
        self.model = build_model(features or experiment.model, "binary", derive_seed(experiment.seed, "initial weights"))
        self.linear: LogisticRegression | None = None
        if features is not None:
            found = frozen(self.model, train, features, self.compute)
            self.linear = LogisticRegression(C=INVERSE_PENALTY, max_iter=300).fit(found, train.labels)
            return
        counts = np.bincount(train.labels, minlength=2).tolist()
        self.model = self.compute.place(self.model)
        for number in range(1, experiment.rounds + 1):
            plan = RoundPlan(experiment, number, "covered lungs")
            train_locally(build_setup(self.model, counts, plan, self.compute), train, plan)

    def predict(self, data: Dataset) -> Predictions:
        if self.linear is not None and self.cfg is not None:
            scores = self.linear.predict_proba(frozen(self.model, data, self.cfg, self.compute))
            return Predictions(scores, data.labels, data.patients)
        return judge(self.model, data, self.experiment, self.compute)


def judge(model: nn.Module, data: Dataset, cfg: ExperimentConfig, compute: Compute) -> Predictions:
    """What `model` says of each image."""
    scores = predict_probabilities(model, data, compute, cfg.model.in_channels, cfg.evaluation.batch_size)
    return Predictions(scores, data.labels, data.patients)


def frozen(model: nn.Module, data: Dataset, cfg: ModelConfig, compute: Compute) -> NDArray[np.float32]:
    """Features of each image with its own mean and length taken out."""
    found = compute_features(compute.place(model), data, compute, cfg.in_channels)
    found = found - found.mean(axis=1, keepdims=True)
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6), np.float32)


def measure(sets: Mapping[str, Outlined], experiment: ExperimentConfig, options: argparse.Namespace) -> Iterator[str]:
    """The tables, line by line, each as soon as it is known."""
    held_out = {name: found for name, found in sets.items() if name != TRAIN}
    settings = Bootstrap(seed=options.seed)
    plain = Trained(sets[TRAIN].covered("none"), experiment, options.features, options.device)
    reference = {name: plain.predict(found.covered("none")) for name, found in held_out.items()}
    yield from _head("trained and tested under", held_out)
    for cover in options.covers:
        model = plain if cover == "none" else Trained(sets[TRAIN].covered(cover), experiment, options.features, options.device)
        yield _row(cover, {name: model.predict(found.covered(cover)) for name, found in held_out.items()}, reference, settings)
    yield from _head("trained on whole images, tested under", held_out)
    for cover in options.covers:
        yield _row(cover, {name: plain.predict(found.covered(cover)) for name, found in held_out.items()}, reference, settings)
    if options.reduce:
        changed = load_experiment(options.config, merge(parse_overrides(options.set), parse_overrides(options.reduce)))
        model = Trained(sets[TRAIN].covered("none"), _sized(changed, options), None, options.device)
        yield from _head("whole images, trained with", held_out)
        yield _row("as given", reference, reference, settings)
        scored = {name: model.predict(found.covered("none")) for name, found in held_out.items()}
        yield _row(", ".join(options.reduce), scored, reference, settings)
    yield from _head("tells this set from the others, under", sets)
    for cover in options.covers:
        yield _row(cover, tell_sets_apart(sets, cover, options), None, settings)


def judge_run(sets: Mapping[str, Outlined], options: argparse.Namespace) -> Iterator[str]:
    """The table of a run's kept weights, line by line."""
    file = options.run / "checkpoints" / "best.pt"
    experiment, compute = read_checkpoint(file).experiment, build_compute(options.device, "fp32")
    model = build_model(experiment.model.without_weights(), experiment.task, seed=0)
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    model = compute.place(model)
    reference = {name: judge(model, found.covered("none"), experiment, compute) for name, found in sets.items()}
    yield from _head("the run's model, tested under", sets)
    for cover in options.covers:
        scored = {name: judge(model, found.covered(cover), experiment, compute) for name, found in sets.items()}
        yield _row(cover, scored, reference, Bootstrap(seed=options.seed))


def tell_sets_apart(sets: Mapping[str, Outlined], cover: Cover, options: argparse.Namespace) -> Scored:
    """For each set, scores of being of it, of some images of all sets, by a classifier that saw no other image of the same patient."""
    order = {
        name: numpy_generator("tell sets apart", name, options.seed).permutation(len(one.labels)) for name, one in sets.items()
    }
    parts = [found.some(np.sort(order[name][:MOST_OF_A_SET])).covered(cover) for name, found in sets.items()]
    pixels, owner = (
        np.concatenate([part.pixels for part in parts]),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
    )
    patients = tuple(patient for part in parts for patient in part.patients)
    data = Dataset(pixels, owner, patients, tuple(map(str, range(len(owner)))), DataReport())
    cfg = options.features or ModelConfig(name="scattering")
    compute = build_compute(options.device, "fp32")
    found = frozen(build_model(cfg, "binary", derive_seed(options.seed, "initial weights")), data, cfg, compute)
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=300, class_weight="balanced")
    chances = cross_val_predict(model, found, owner, groups=patients, cv=GroupKFold(5), method="predict_proba")
    pairs = {name: np.stack([1.0 - chances[:, number], chances[:, number]], axis=1) for number, name in enumerate(sets)}
    return {name: Predictions(pairs[name], (owner == number).astype(np.int64), patients) for number, name in enumerate(sets)}


def _head(title: str, sets: Mapping[str, Outlined]) -> Iterator[str]:
    yield ""
    yield f"| {title} | " + " | ".join(f"{name} ({len(found.labels)})" for name, found in sets.items()) + " |"
    yield "|---" * (1 + len(sets)) + "|"


def _row(title: str, scored: Scored, reference: Scored | None, settings: Bootstrap) -> str:
    cells = []
    for name, predictions in scored.items():
        cell = _show(bootstrap(predictions, 0.5, settings)["auroc"])
        if reference is not None and not np.array_equal(predictions.probabilities, reference[name].probabilities):
            change = bootstrap_difference(predictions, reference[name], settings)
            cell += f", {change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
        cells.append(cell)
    return f"| {title} | {' | '.join(cells)} |"


def _show(found: ConfidenceInterval) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _sized(experiment: ExperimentConfig, options: argparse.Namespace) -> ExperimentConfig:
    """The recipe as one place trains it: at the size asked for, a round a pass, without privacy, which a network in one place lacks."""
    changes = {"image": {"size_px": options.image_size}, "rounds": options.rounds, "training": {"local_epochs": 1}}
    values = merge(experiment.model_dump(), changes | {"seed": options.seed, "privacy": {"mechanism": "none"}})
    return build_config(ExperimentConfig, values)


def main() -> None:
    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run is None:
        experiment = _sized(load_experiment(options.config, parse_overrides(options.set)), options)
        records = {TRAIN: read_kaggle(options.data)[0].records, TEST: read_kaggle(options.data, (TEST,))[0].records}
        records |= {name: read_source(place).manifest.records for name, place in options.external}
        what = _describe(options, experiment)
    else:
        experiment = read_checkpoint(options.run / "checkpoints" / "best.pt").experiment
        settings = build_config(CoordinatorConfig, read_yaml(options.run / "coordinator" / "coordinator.yaml"))
        records = {name: read_manifest(Path(file)).records for name, file in central_manifests(settings).items()}
        what = f"{experiment.model.name} of a run"
    lines = [f"image {experiment.image.size_px} px, seed {options.seed}, {what}"]
    print(lines[0], flush=True)
    sets = {}
    for name, found in records.items():
        sets[name] = outline_set(name, found, experiment, options)
        lines.append(f"{name}: {_describe_used(sets[name])}")
        print(lines[-1], flush=True)
    for line in measure(sets, experiment, options) if options.run is None else judge_run(sets, options):
        lines.append(line)
        print(line, flush=True)
        (options.out / "covered.md").write_text("\n".join(lines) + "\n")


def _describe_used(outlined: Outlined) -> str:
    """How many images have an outline, by class: a white lung has none more often, so what is left out is no chance draw."""
    used, parts = np.bincount(outlined.labels, minlength=2), []
    for label, name in enumerate(("normal", "pneumonia")):
        if outlined.found[label]:
            parts.append(f"{1 - used[label] / outlined.found[label]:.1%} of {outlined.found[label]} {name}")
    return f"{used.sum()} of {sum(outlined.found)} images; without a usable outline are {' and '.join(parts)}"


def _describe(options: argparse.Namespace, experiment: ExperimentConfig) -> str:
    if options.features is not None:
        return f"frozen features of {options.features.name}, logistic regression"
    return f"{experiment.model.name}, {experiment.rounds} passes"


def _features(text: str) -> ModelConfig:
    return build_config(ModelConfig, dict(zip(("name", "norm", "weights"), text.split(":"), strict=False)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder in the Kaggle layout, with train/ and test/")
    source.add_argument("--run", type=Path, help="folder of a simulation; nothing is trained")
    parser.add_argument("--external", type=named_source, action="append", default=[], metavar="NAME=SOURCE", help="may repeat")
    parser.add_argument("--out", type=Path, required=True, help="tables; and places, so that a second call finds no lungs again")
    parser.add_argument("--features", type=_features, nargs="?", const="scattering", metavar="NAME[:NORM[:WEIGHTS]]")
    parser.add_argument("--covers", nargs="+", choices=COVERS, default=COVERS)
    parser.add_argument("--config", help="experiment; a file or a name such as kaggle")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the experiment; may repeat")
    parser.add_argument("--reduce", action="append", default=[], metavar="KEY=VALUE", help="of one more network; may repeat")
    parser.add_argument("--rounds", type=int, default=8, help="passes over the training images")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int, help="of each set at most, drawn at random")
    parser.add_argument("--processes", type=int, default=1, help="that look for lungs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if {TRAIN, TEST} & {name for name, _ in options.external}:
        parser.error(f"--external: {TRAIN} and {TEST} are of --data; choose another name")
    if options.run is not None and (options.external or options.features or options.reduce or options.set or options.config):
        parser.error(
            "--run judges a run's model on the run's sets; --external, --features, --config, --set and --reduce do not go with it"
        )
    if options.reduce and options.features is not None:
        parser.error("--reduce changes how a network is trained; with --features none is")
    return options


if __name__ == "__main__":
    main()
