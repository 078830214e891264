"""How often the drift monitor cries wolf, and how many patients it takes to see each change of a scanner.

    python -m benchmarks.drift --run RUN --data DATA --cache FOLDER [--out FOLDER]

On real images that the run's network was not trained on: the hospitals' validation patients and the test set, the first image of each
patient. Its features are computed once for each change and kept in the cache folder. Changes are those of `simulation.scanners`, at the
network's resolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from client.monitor.monitor import find
from client.monitor.page import write_page
from client.site import load_site, read_site_config
from common.compute import build_compute
from common.config import ExperimentConfig
from common.data.dataset import Dataset, load_dataset
from common.data.sources.kaggle import read_kaggle
from common.drift.bets import list_tests
from common.drift.looks import look
from common.drift.observations import Observations
from common.drift.reference import Reference
from common.drift.watch import RATE, Stream, watch
from common.features import compute_features
from common.images import fit_square
from common.layout import ArraysLayout
from common.model_bundle.calibration import fit_calibration, pneumonia_score
from common.model_bundle.pixel_statistics import NAMES, pixel_statistics
from common.models import build_model, classifier_of
from common.seeds import numpy_generator
from server.checkpoints import read_checkpoint
from simulation.scanners import Scanner, apply

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

FIRST_DAY = 739_000
PATIENTS_A_DAY, DAYS_A_WEEK = 20, 5
REFERENCE_PATIENTS, QUIET_PATIENTS = 250, 100
SCANNERS = {
    "contrast +0.9": Scanner("", contrast=0.9),
    "contrast +0.45": Scanner("", contrast=0.45),
    "contrast -0.8": Scanner("", contrast=-0.8),
    "gamma 1.55 (darker)": Scanner("", gamma=1.55),
    "blur 0.012": Scanner("", blur=0.012),
    "noise 0.05": Scanner("", noise=0.05),
    "blur 0.006": Scanner("", blur=0.006),
    "noise 0.02": Scanner("", noise=0.02),
    "collimation 0.05": Scanner("", collimation=0.05),
    "zoom 1.12": Scanner("", zoom=1.12),
}
"""Each property at the end of the range that the simulation draws from, and some within."""
INVERTED, RESOLUTION = "MONOCHROME1 not inverted", "half the resolution"
SHARES = (0.3, 0.8)


@dataclass(frozen=True)
class Pool:
    """Images, one a patient: features [N, D], scores [N] before calibration, statistics [N, K], labels [N]."""

    features: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    statistics: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def take(self, rows: Rows) -> Pool:
        return Pool(*(values[rows] for values in vars(self).values()))


@dataclass(frozen=True)
class Bench:
    """What every measurement needs.

    Attributes:
        plain: all patients, as they are.
        early, late: rows of `plain`: those before a change, and those after it.
        changed: by change, the patients `late` as it shows them.
    """

    plain: Pool
    early: Rows
    late: Rows
    changed: dict[str, Pool]

    def reference(self, rows: Rows, name: str) -> Reference:
        own = self.plain.take(rows)
        arrays = {"features": own.features, "probabilities": self.probabilities(own), "pixel_statistics": own.statistics}
        return Reference.of(name, NAMES, {**arrays, "labels": own.labels})

    def probabilities(self, pool: Pool) -> npt.NDArray[np.float64]:
        positive = self.plain.labels.astype(np.float64)
        fitted = fit_calibration(self.plain.scores, 1.0 - positive, positive, "temperature", fitted_on="the pool")
        return fitted.probability(pool.scores)

    def observe(self, pool: Pool, reference: Reference, patients_a_day: int = PATIENTS_A_DAY) -> Observations:
        """`pool` as it arrives, on five days a week, read by a reader who is always right."""
        n, p = len(pool.labels), self.probabilities(pool)
        working = np.arange(n) // patients_a_day
        days = FIRST_DAY + working // DAYS_A_WEEK * 7 + working % DAYS_A_WEEK
        called = p >= 0.5
        return Observations(
            days=days,
            scanners=np.full(n, "scanner A"),
            units=np.arange(n).astype(np.str_),
            statistics=pool.statistics.astype(np.float64),
            embedding=reference.embedding.map(pool.features),
            probabilities=p,
            refused=np.zeros(n, np.bool_),
            expected_errors=np.where(called, 1.0 - p, p),
            corrected=called != (pool.labels == 1),
            read_order=np.arange(n),
            read_days=days,
        )


def main() -> None:
    arguments = _parse()
    bench = _load(arguments)
    n = len(bench.plain.labels)
    print(
        f"{n} patients, {bench.plain.labels.mean():.0%} with pneumonia; reference {REFERENCE_PATIENTS}, rate {RATE:g} a site and year"
    )
    print("\nNo drift")
    _weeks(bench, 200)
    _years(bench, arguments.repeats_of_years)
    print("\nPatients after the change until the alarm, after 100 without it: median (5 % to 95 %), of repeats that alarm")
    for name in bench.changed:
        _detect(bench, name, arguments.repeats)
    for share in SHARES:
        _shift_labels(bench, share, arguments.repeats)
    if arguments.out:
        _show(bench, arguments.out)


def _weeks(bench: Bench, weeks: int) -> None:
    """Each a fresh split of the patients into reference and a week's arrivals, without replacement: exchangeable, disjoint."""
    alarms = days = marked = 0
    size = PATIENTS_A_DAY * DAYS_A_WEEK
    for week in range(weeks):
        rows = numpy_generator("drift bench", "week", week).permutation(len(bench.plain.labels))
        reference = bench.reference(np.sort(rows[:REFERENCE_PATIENTS]), f"week {week}")
        found = bench.observe(bench.plain.take(rows[REFERENCE_PATIENTS:][:size]), reference)
        alarms += any(stream.alarm is not None for stream in watch(found, reference))
        looks = look(found, reference, list_tests(found, ()))
        days, marked = days + len(looks), marked + sum(min(seen.p_values.values()) <= RATE for seen in looks)
    print(f"  {weeks} weeks, each after its own reference: {alarms} with an alarm")
    print(f"  their {days} single days: {marked} with an adjusted p-value <= {RATE:g}, {marked / days:.1%}", flush=True)


def _years(bench: Bench, repeats: int, weeks: int = 200, patients_a_day: int = 10) -> None:
    """Weeks on end. Reference and arrivals are drawn alike from all patients with replacement, since no held-out set is so large."""
    years = alarmed = 0
    for repeat in range(repeats):
        rng, n = numpy_generator("drift bench", "year", repeat), len(bench.plain.labels)
        reference = bench.reference(rng.integers(n, size=REFERENCE_PATIENTS), f"year {repeat}")
        arrivals = bench.plain.take(rng.integers(n, size=weeks * DAYS_A_WEEK * patients_a_day))
        streams = watch(bench.observe(arrivals, reference, patients_a_day), reference)
        years += len({stream.year for stream in streams})
        alarmed += len({stream.year for stream in streams if stream.alarm is not None})
    print(f"  {repeats} times {weeks} weeks on end: {alarmed} of {years} years with an alarm", flush=True)


def _detect(bench: Bench, change: str, repeats: int) -> None:
    waits, first = [], []
    for repeat in range(repeats):
        rng = numpy_generator("drift bench", "change", repeat)
        known, quiet = np.split(rng.permutation(bench.early), [REFERENCE_PATIENTS])
        reference = bench.reference(np.sort(known), f"change {repeat}")
        after = bench.changed[change].take(rng.permutation(len(bench.late)))
        arrivals = _join(bench.plain.take(quiet), after)
        streams = watch(bench.observe(arrivals, reference), reference)
        waits.append(_wait(streams))
        first += [
            stream.quantity for stream in streams if stream.alarm is not None and stream.alarm + 1 - QUIET_PATIENTS == waits[-1]
        ]
    names, counts = np.unique(first, return_counts=True)
    print(f"  {change:26s} {_told(waits)}  by {names[counts.argmax()] if len(names) else 'none'}", flush=True)


def _shift_labels(bench: Bench, share: float, repeats: int) -> None:
    """Another share of pneumonia and nothing else; also how well it is estimated from the arrivals after the change."""
    waits, estimates, covered = [], [], 0
    for repeat in range(repeats):
        rng = numpy_generator("drift bench", "share", repeat)
        known, quiet = np.split(rng.permutation(bench.early), [REFERENCE_PATIENTS])
        rest = rng.permutation(bench.late)
        positive, negative = rest[bench.plain.labels[rest] == 1], rest[bench.plain.labels[rest] == 0]
        n = int(min(len(positive) / share, len(negative) / (1.0 - share)))
        shifted = np.concatenate([positive[: round(n * share)], negative[: n - round(n * share)]])
        shifted = rng.permutation(shifted)
        reference = bench.reference(np.sort(known), f"share {repeat}")
        streams = watch(bench.observe(_join(bench.plain.take(quiet), bench.plain.take(shifted)), reference), reference)
        waits.append(_wait(streams))
        arrived = bench.observe(bench.plain.take(shifted), reference, n)
        found = look(arrived, reference, list_tests(arrived, ()))[0].prevalence
        if found:
            estimates.append(found.value)
            covered += found.low <= share <= found.high
    print(f"  {share:.0%} with pneumonia       {_told(waits)}  of {n} patients; estimated {np.mean(estimates):.3f} (mean), "
          f"the 95 % interval holds {share:g} in {covered} of {repeats}", flush=True)  # fmt: skip


def _wait(streams: list[Stream]) -> float:
    """Patients after the change until the first alarm; infinity without one, below 1 for one that came before the change."""
    return min((float(stream.alarm + 1 - QUIET_PATIENTS) for stream in streams if stream.alarm is not None), default=float("inf"))


def _told(waits: list[float]) -> str:
    true = [wait for wait in waits if 0 < wait < np.inf]
    early = sum(wait <= 0 for wait in waits)
    if not true:
        return f"{'–':>16s}  0/{len(waits)}"
    low, middle, high = np.quantile(true, (0.05, 0.5, 0.95))
    return f"{middle:5.0f} ({low:3.0f} to {high:3.0f})  {len(true)}/{len(waits)}" + (f", {early} before it" if early else "")


def _join(*pools: Pool) -> Pool:
    return Pool(*(np.concatenate(parts) for parts in zip(*(vars(pool).values() for pool in pools), strict=True)))


def _show(bench: Bench, out: Path) -> None:
    """The page of a made-up site: two scanners, one of which gets another contrast curve."""
    known, quiet = np.split(numpy_generator("drift bench", "page").permutation(bench.early), [REFERENCE_PATIENTS])
    reference = bench.reference(np.sort(known), "page")
    half = len(bench.late) // 2
    steady = bench.observe(bench.plain.take(bench.late[:half]), reference, 8)
    after = bench.changed["contrast +0.45"].take(np.arange(half, half + 60))
    turned = bench.observe(_join(bench.plain.take(quiet), after), reference, 8)
    turned = replace(turned, scanners=np.full(len(turned), "scanner B"), units=np.char.add("b", turned.units))
    columns = {name: np.concatenate([getattr(steady, name), getattr(turned, name)]) for name in vars(steady)}
    order = np.argsort(columns["days"], kind="stable")
    found = replace(Observations(**columns).take(order), read_order=np.arange(len(order)))
    print(*write_page(out, find(found, reference), reference))


def _load(arguments: argparse.Namespace) -> Bench:
    checkpoint = read_checkpoint(arguments.run / "checkpoints" / "best.pt")
    cfg, cache = checkpoint.experiment, arguments.cache
    model = build_model(cfg.model.without_weights(), cfg.task, seed=0)
    ArraysLayout.of(model).load(model, checkpoint.arrays.parameters, checkpoint.arrays.statistics)
    images, labels = _images(arguments, cfg)
    plain = _pool(model, images, labels, cache / "plain.npz")
    rows = numpy_generator("drift bench", "late").permutation(len(labels))
    early, late = np.split(rows, [REFERENCE_PATIENTS + QUIET_PATIENTS])
    changed = {}
    for name in (*SCANNERS, INVERTED, RESOLUTION):
        file = cache / f"{name.split(' (')[0].replace(' ', '_')}.npz"
        changed[name] = _pool(model, images[late], labels[late], file, name)
    return Bench(plain, early, late, changed)


def _images(arguments: argparse.Namespace, cfg: ExperimentConfig) -> tuple[Pixels, Rows]:
    """uint8 [N, S, S] and labels [N]: the first image of each patient."""
    file = arguments.cache / "images.npz"
    if not file.exists():
        arguments.cache.mkdir(parents=True, exist_ok=True)
        parts = [_first_images(data) for data in _held_out(arguments, cfg)]
        np.savez(file, images=np.concatenate([part[0] for part in parts]), labels=np.concatenate([part[1] for part in parts]))
    with np.load(file) as arrays:
        return arrays["images"], arrays["labels"]


def _held_out(arguments: argparse.Namespace, cfg: ExperimentConfig) -> Iterator[Dataset]:
    manifest, _ = read_kaggle(arguments.data, ("test",))
    yield load_dataset(manifest, cfg.task, cfg.image, arguments.cache / "test")
    for path in sorted((arguments.run / "sites").glob("*.yaml")):
        config = read_site_config(path)
        yield load_site(config.model_copy(update={"work_dir": str(arguments.cache / config.name)}), cfg).validation


def _first_images(data: Dataset) -> tuple[Pixels, Rows]:
    rows = np.sort(np.unique(np.array(data.patients), return_index=True)[1])
    return np.asarray(data.pixels[rows]), data.labels[rows]


def _change(images: Pixels, name: str) -> Pixels:
    rng = numpy_generator("drift bench", name)
    shown = [_show_image(image / np.float32(255.0), name, rng) for image in images]
    return np.rint(np.stack(shown) * 255.0).astype(np.uint8)


def _show_image(image: npt.NDArray[np.float32], name: str, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    if name == INVERTED:
        return 1.0 - image
    if name == RESOLUTION:
        return fit_square(fit_square(image, len(image) // 2, "pad"), len(image), "pad")
    return apply(image, SCANNERS[name], rng)


def _pool(model: torch.nn.Module, images: Pixels, labels: Rows, file: Path, change: str = "") -> Pool:
    if not file.exists():
        _compute(model, _change(images, change) if change else images, labels, file)
    with np.load(file) as arrays:
        return Pool(arrays["features"], arrays["scores"], arrays["statistics"], labels)


def _compute(model: torch.nn.Module, images: Pixels, labels: Rows, file: Path) -> None:
    data = Dataset(images, labels, (), (), None)  # type: ignore[arg-type]
    features = compute_features(model, data, build_compute("cpu", "fp32"), 1, batch_size=64)
    classifier = classifier_of(model)
    logits = features @ classifier.weight.detach().numpy().T + classifier.bias.detach().numpy()
    statistics = pixel_statistics(images / np.float32(255.0))
    np.savez(file, features=features, scores=pneumonia_score(logits), statistics=statistics)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder with checkpoints/best.pt and sites/")
    parser.add_argument("--data", type=Path, required=True, help="folder in the Kaggle layout")
    parser.add_argument("--cache", type=Path, required=True, help="folder for images and features")
    parser.add_argument("--out", type=Path, help="folder for a page of a made-up site")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--repeats-of-years", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
