"""Both errors of the suitability check, on real images: good ones that are refused, and unsuitable ones that are judged.

    python -m benchmarks.suitability BUNDLE --reference SET [SET ...] [--good NAME=FOLDER ...] [--bad NAME=FOLDER ...]

Each SET of the reference is a manifest (.csv), or a folder in the Kaggle layout, whose file names tell patients; several are one
reference, as of a model of several populations. Good images of the same population are the quarter of each set's patients that is left out
of the fit, in `--splits` random ways. All other sets are checked by a fit on all of the reference. The bundle gives the network and the
preprocessing; its own suitability parameters are not looked at.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pneumofed.common.data.manifest import ImageRecord, read_manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.data.sources.table import walk_files
from pneumofed.common.errors import ImageError
from pneumofed.common.imaging.types import ImageInfo
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.image_statistics import PIXEL_STATISTICS
from pneumofed.common.model_bundle.predictor import BATCH, Predictor
from pneumofed.common.model_bundle.suitability import Inputs, Suitability, SuitabilityResult, check_suitability, fit_suitability
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.other_images import CORRUPTIONS, PATTERNS, corrupt, draw_pattern

DRAWN = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", nargs="+", type=Path, required=True, metavar="SET")
    parser.add_argument("--good", nargs="*", default=[], type=_named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--bad", nargs="*", default=[], type=_named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--every", type=int, default=8, help="every n-th reference image is spoilt")
    args = parser.parse_args()
    predictor = Predictor(load_bundle(args.bundle, None), threads=1)
    sets = [_read_set(path) for path in args.reference]
    parts = [_inputs(predictor, [record.path for record in records]) for records in sets]
    names = [np.array([f"{number} {record.patient}" for record in records]) for number, records in enumerate(sets)]
    reference, patients = _join(parts), np.concatenate(names)
    rates = np.array([_held_out(reference, names, seed) for seed in range(args.splits)]).mean(axis=0)
    for path, rate in zip(args.reference, rates, strict=True):
        print(
            f"refused of left-out patients of {path.name}: {rate:.3%} (mean of {args.splits} splits), stated of all: at most 2 %"
        )
    fitted = _fit(reference, patients)
    for name, folder in (*args.good, *args.bad):
        _tell(name, check_suitability(fitted, _inputs(predictor, walk_files(folder))))
    for name, squares in _unsuitable(reference.images[:: args.every], predictor.manifest.preprocessing.size_px):
        _tell(name, check_suitability(fitted, _run(predictor, squares, [reference.infos[0]] * len(squares))))


def _read_set(path: Path) -> Sequence[ImageRecord]:
    manifest = read_manifest(path) if path.suffix == ".csv" else read_kaggle(path.parent, [path.name])[0]
    return manifest.records


def _join(parts: Sequence[Inputs]) -> Inputs:
    images, features = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "features"))
    statistics = np.concatenate([part.pixel_statistics for part in parts])
    return Inputs(images, features, statistics, [info for part in parts for info in part.infos])


def _named_folder(text: str) -> tuple[str, Path]:
    """Name and folder of `NAME=FOLDER`; refused before the long work begins."""
    name, _, folder = text.partition("=")
    if not name or not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER with a folder that exists, got {text!r}")
    return name, Path(folder)


def _unsuitable(squares: np.ndarray, side: int) -> Iterable[tuple[str, np.ndarray]]:
    for how in CORRUPTIONS:
        yield f"spoilt: {how}", np.stack([corrupt(square, how) for square in squares])
    for kind in PATTERNS:
        generator = numpy_generator("benchmark", kind)
        yield f"drawn: {kind}", np.stack([draw_pattern(kind, side, generator) for _ in range(DRAWN)])


def _inputs(predictor: Predictor, paths: Iterable[Path]) -> Inputs:
    squares, infos = [], []
    for path in paths:
        try:
            image = predictor.read(path).image
        except ImageError:
            continue
        squares.append(predictor.prepare(image))
        infos.append(image.info)
    return _run(predictor, np.stack(squares), infos)


def _run(predictor: Predictor, squares: np.ndarray, infos: list[ImageInfo]) -> Inputs:
    batches = [squares[start : start + BATCH, None] for start in range(0, len(squares), BATCH)]
    features = np.concatenate([predictor.run(batch)["features"] for batch in batches])
    return Inputs(squares, features, np.zeros((len(squares), len(PIXEL_STATISTICS)), np.float32), infos)


def _part(inputs: Inputs, chosen: np.ndarray) -> Inputs:
    rows = np.flatnonzero(chosen)
    return Inputs(
        inputs.images[rows], inputs.features[rows], inputs.pixel_statistics[rows], [inputs.infos[int(row)] for row in rows]
    )


def _fit(inputs: Inputs, patients: np.ndarray) -> Suitability:
    return fit_suitability(inputs.images, inputs.features, inputs.pixel_statistics, patients=patients.tolist())


def _held_out(inputs: Inputs, sets: Sequence[np.ndarray], seed: int) -> list[float]:
    """Of each set, the share of the left-out patients that is refused."""
    generator, left = numpy_generator(seed, "benchmark"), set()
    for patients in sets:
        everyone = generator.permutation(np.unique(patients))
        left |= set(everyone[: len(everyone) // 4].tolist())
    patients = np.concatenate(sets)
    out = np.isin(patients, list(left))
    found = check_suitability(_fit(_part(inputs, ~out), patients[~out]), _part(inputs, out))
    refused = np.array([bool(finding.reasons) for finding in found])
    # What is guaranteed is the chance of one image of a new patient, so each patient counts once.
    of_patient = {patient: refused[patients[out] == patient].mean() for patient in left}
    return [float(np.mean([of_patient[patient] for patient in np.unique(names) if patient in left])) for names in sets]


def _tell(name: str, found: list[SuitabilityResult]) -> None:
    reasons = Counter(reason.value for finding in found for reason in finding.reasons)
    shares = ", ".join(f"{reason} {count / len(found):.0%}" for reason, count in reasons.most_common())
    print(f"{name}: {np.mean([bool(finding.reasons) for finding in found]):.1%} of {len(found)} refused ({shares})")


if __name__ == "__main__":
    main()
