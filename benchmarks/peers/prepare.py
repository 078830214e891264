"""Makes the work: draws images of a set, decodes them once, deals them to hospitals, and fixes split, batches and first weights.

    WORK/work.json        recipe, and each hospital's images by position: training, validation, and the batches of every round
    WORK/images.npy       decoded training and validation images of all hospitals, uint8 [N, S, S]; labels.npy int64 [N]
    WORK/test_images.npy  the held-out test set, likewise
    WORK/set/             the same images as PNG files with a table, which pneumofed reads as it reads any data set

The split and the order of batches are pneumofed's own, since it takes no others; the other systems get them as lists.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers.work import IMAGES, LABELS, TEST_IMAGES, TEST_LABELS, Hospital, Recipe, Work
from pneumofed.client.data.splits import split_by_patient
from pneumofed.client.federation.training import draw_batches
from pneumofed.common.config.experiment import ImageConfig, TrainingConfig
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.manifest import Manifest
from pneumofed.common.data.sources.public_sets import is_kaggle
from pneumofed.common.data.tables import TableWriter
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.simulation.hospitals.partition import partition
from pneumofed.simulation.hospitals.sources import read_source
from pneumofed.simulation.hospitals.study import numbered_name
from pneumofed.simulation.phantoms.phantom import write_phantoms

SET, TABLE, TEST = "set", "labels.csv", "test"
VALIDATION_FRACTION = TrainingConfig().validation_fraction


def prepare(data: Path | None, images: int, hospitals: int, recipe: Recipe, folder: Path) -> Work:
    """Writes the folder of a piece of work.

    Args:
        data: a set in the Kaggle layout with train/ and test/; None: phantoms are drawn.
        images: of training and validation of all hospitals, about: patients are taken whole.
        hospitals: among how many they are dealt, by patient and with like mixes of classes.
        recipe: what is trained.
        folder: is made.

    Raises:
        SystemExit: `data` has not the layout.
    """
    folder.mkdir(parents=True)
    if data is None:
        data = folder / "phantoms"
        write_phantoms(data, max(hospitals * 4, images), derive_seed(recipe.seed, "phantoms"))
    if not is_kaggle(data) or not (data / TEST).is_dir():
        raise SystemExit(f"{data}: expected the Kaggle layout with train/ and test/")
    image = ImageConfig(size_px=recipe.size_px)
    drawn = _draw(read_source(data / "train").manifest, images, recipe.seed)
    dataset = _unlike(load_dataset(drawn, "binary", image, folder / "cache" / "train"), ())
    held_out = _unlike(load_dataset(read_source(data / TEST).manifest, "binary", image, folder / "cache" / TEST), dataset.pixels)
    parts = partition(Manifest(dataset.records), hospitals, "iid", 1.0, derive_seed(recipe.seed, "partition"))
    parts = sorted(parts, key=lambda part: -len(part))
    position = {record.path: number for number, record in enumerate(dataset.records)}
    rows = [position[record.path] for part in parts for record in part.records]
    ordered = dataset.subset(rows)
    np.save(folder / IMAGES, ordered.pixels)
    np.save(folder / LABELS, ordered.labels)
    np.save(folder / TEST_IMAGES, held_out.pixels)
    np.save(folder / TEST_LABELS, held_out.labels)
    names = [numbered_name("site", number, hospitals) for number in range(hospitals)]
    owners = [name for name, part in zip(names, parts, strict=True) for _ in part.records]
    _write_set(folder / SET, ordered, owners)
    _write_set(folder / TEST, held_out, ["test"] * len(held_out))
    work = Work(folder, recipe, tuple(_hospitals(ordered, owners, recipe)))
    work.write()
    return work


def _draw(manifest: Manifest, images: int, seed: int) -> Manifest:
    """So many images of whole patients, drawn at random."""
    patients = sorted(set(manifest.patients))
    random.Random(derive_seed(seed, "images")).shuffle(patients)
    by_patient: dict[str, list[int]] = {}
    for number, patient in enumerate(manifest.patients):
        by_patient.setdefault(patient, []).append(number)
    rows: list[int] = []
    for patient in patients:
        if len(rows) >= images:
            break
        rows += by_patient[patient]
    return Manifest(tuple(manifest.records[row] for row in sorted(rows)))


def _unlike(dataset: Dataset, others: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Dataset:
    """Without images whose decoded pixels came before: pneumofed leaves equal files out, and small images of two files can be equal."""
    seen = {np.asarray(pixels).tobytes() for pixels in others}
    kept = []
    for number in range(len(dataset)):
        pixels = np.asarray(dataset.pixels[number]).tobytes()
        if pixels not in seen:
            seen.add(pixels)
            kept.append(number)
    return dataset.subset(kept)


def _write_set(folder: Path, dataset: Dataset, owners: Sequence[str]) -> None:
    """PNG files and a table; what pneumofed decodes of them are the very pixels."""
    folder.mkdir()
    with (folder / TABLE).open("w", newline="") as file:
        table = TableWriter(file)
        table.write(("path", "label", "patient", "hospital"))
        for number, (label, patient, owner) in enumerate(zip(dataset.labels, dataset.patients, owners, strict=True)):
            name = f"{number:05d}.png"
            Image.fromarray(np.asarray(dataset.pixels[number])).save(folder / name, compress_level=1)
            table.write((name, ("normal", "pneumonia")[int(label)], patient, owner))


def _hospitals(dataset: Dataset, owners: Sequence[str], recipe: Recipe) -> Iterator[Hospital]:
    for name in dict.fromkeys(owners):
        own = np.array([row for row, owner in enumerate(owners) if owner == name])
        # pneumofed reads a table in its order; the split does not depend on it, the batches do.
        patients = [dataset.patients[row] for row in own]
        seed = derive_seed(recipe.seed, name, "validation split")
        train, validation = split_by_patient(patients, dataset.labels[own].tolist(), VALIDATION_FRACTION, seed)
        rounds = [draw_batches(len(train), recipe.batch_size, numpy_generator(recipe.seed, number, name, "batches"))
                  for number in range(1, recipe.rounds + 1)]  # fmt: skip
        batches = [[own[train[np.sort(batch)]].tolist() for batch in one] for one in rounds]
        yield Hospital(name, own[train].tolist(), own[validation].tolist(), batches)
