"""How often the drift monitor cries wolf, and how many patients it takes to see each change of a scanner.

    python -m benchmarks.drift --run RUN --data DATA --cache FOLDER [--out FOLDER]

On real images that the run's network was not trained on: the hospitals' validation patients and the test set, the first image of each
patient. Its features are computed once for each change and kept in the cache folder. Changes are those of
`pneumofed.simulation.phantoms.scanners`, at the network's resolution.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.drift_images import DAYS_A_WEEK, PATIENTS_A_DAY, QUIET_PATIENTS, REFERENCE_PATIENTS, Bench, Pool, load_bench
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.e_processes import list_tests
from pneumofed.inference.monitor.monitor import find_drift
from pneumofed.inference.monitor.page import write_drift_page
from pneumofed.inference.monitor.reference import Observations
from pneumofed.inference.monitor.streams import FALSE_ALARM_RATE, Stream, daily_tests, watch

SHARES = (0.3, 0.8)
SHIFTED_PATIENTS = 1000


def main() -> None:
    arguments = _parse()
    bench = load_bench(arguments.run, arguments.data, arguments.cache)
    n = len(bench.plain.labels)
    print(
        f"{n} patients, {bench.plain.labels.mean():.0%} with pneumonia; reference {REFERENCE_PATIENTS}, "
        f"rate {FALSE_ALARM_RATE:g} a site and year"
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
        single_days = daily_tests(found, reference, list_tests(found, ()))
        days, marked = (
            days + len(single_days),
            marked + sum(min(seen.p_values.values()) <= FALSE_ALARM_RATE for seen in single_days),
        )
    print(f"  {weeks} weeks, each after its own reference: {alarms} with an alarm")
    print(
        f"  their {days} single days: {marked} with an adjusted p-value <= {FALSE_ALARM_RATE:g}, {marked / days:.1%}", flush=True
    )


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
    """Another share of pneumonia and nothing else, and how well it is estimated from the first 200 patients after the change.

    All patients are drawn with replacement, the reference too: a held-out set does not last until the alarm.
    """
    waits, estimates, covered = [], [], 0
    by_class = [np.flatnonzero(bench.plain.labels == label) for label in (0, 1)]
    for repeat in range(repeats):
        rng = numpy_generator("drift bench", "share", repeat)
        known, quiet = (rng.integers(len(bench.plain.labels), size=n) for n in (REFERENCE_PATIENTS, QUIET_PATIENTS))
        shifted = np.array([rng.choice(by_class[int(rng.random() < share)]) for _ in range(SHIFTED_PATIENTS)])
        reference = bench.reference(known, f"share {repeat}")
        arrivals = bench.plain.take(np.concatenate([quiet, shifted]))
        waits.append(_wait(watch(bench.observe(arrivals, reference), reference)))
        day = bench.observe(bench.plain.take(shifted[:200]), reference, 200)
        found = daily_tests(day, reference, list_tests(day, ()))[0].prevalence
        if found:
            estimates.append(found.value)
            covered += found.low <= share <= found.high
    print(
        f"  {share:.0%} with pneumonia       {_told(waits)}  estimated {np.mean(estimates):.3f} on average, "
        f"the 95 % interval holds it in {covered} of {repeats}",
        flush=True,
    )


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
    after = bench.changed["contrast +0.9"].take(np.arange(half, half + 60))
    turned = bench.observe(_join(bench.plain.take(quiet), after), reference, 8)
    turned = replace(turned, scanners=np.full(len(turned), "scanner B"), units=np.char.add("b", turned.units))
    columns = {name: np.concatenate([getattr(steady, name), getattr(turned, name)]) for name in vars(steady)}
    order = np.argsort(columns["days"], kind="stable")
    found = replace(Observations(**columns).take(order), read_order=np.arange(len(order)))
    print(*write_drift_page(out, find_drift(found, reference), reference))


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
