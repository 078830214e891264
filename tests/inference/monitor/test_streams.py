"""Streams of a monitor: quiet sites stay quiet, a shift is told with its direction and day."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pneumofed.inference.monitor.e_processes import CORRECTIONS, REFUSALS, Baseline
from pneumofed.inference.monitor.reference import Reference
from pneumofed.inference.monitor.streams import FALSE_ALARM_RATE, Stream, watch
from tests.inference.monitor.drawn import draw_arrivals, draw_reference, one_after_another


def alarmed(streams: list[Stream]) -> set[str]:
    return {stream.quantity for stream in streams if stream.alarm is not None}


def test_quiet_sites_stay_quiet_and_a_shift_is_told_with_direction_and_day() -> None:
    reference = draw_reference()
    quiet = draw_arrivals(reference, 300)
    assert not alarmed(watch(quiet, reference))
    found = one_after_another(quiet, draw_arrivals(reference, 100, 2, brighter=2.0))
    streams = {stream.quantity: stream for stream in watch(found, reference)}
    moved = streams["mean"]
    assert alarmed(list(streams.values())) == {"mean"}
    assert moved.direction == "higher"
    assert moved.p_value <= FALSE_ALARM_RATE < streams["deviation"].p_value
    assert abs(moved.since - quiet.days[-1] - 1) <= 1
    assert moved.days[moved.alarm or 0] > quiet.days[-1]


def test_one_scanner_alarms_and_the_other_does_not() -> None:
    reference = draw_reference()
    good, bad = draw_arrivals(reference, 120), draw_arrivals(reference, 120, 2, brighter=-3.0)
    bad = replace(bad, scanners=np.full(len(bad), "B"))
    found = type(good)(**{name: np.stack([getattr(good, name), getattr(bad, name)], axis=1).reshape(-1, *getattr(good, name).shape[1:])
                          for name in vars(good)})  # fmt: skip
    assert {
        (stream.scanner, stream.quantity, stream.direction) for stream in watch(found, reference) if stream.alarm is not None
    } == {("B", "mean", "lower")}


def test_a_patient_counts_once_however_many_images_there_are() -> None:
    reference = draw_reference()
    found = draw_arrivals(reference, 200, brighter=3.0)
    same = replace(found, units=np.full(len(found), "one patient"))
    assert "mean" in alarmed(watch(found, reference))
    assert not alarmed(watch(same, reference))


def test_after_a_baseline_the_scanner_is_compared_with_itself() -> None:
    reference = draw_reference()
    found = draw_arrivals(reference, 400, brighter=3.0)
    baseline = Baseline("A", 0, 150)
    streams = watch(found, reference, [baseline])
    after = [stream for stream in streams if stream.test.own_baseline]
    assert alarmed(streams) == {"mean"}
    assert len(after) == len(reference.quantities) + 2
    assert not alarmed(after)
    assert min(int(stream.rows[0]) for stream in after) >= 150
    moved = one_after_another(found, draw_arrivals(reference, 100, 3))
    assert "mean" in alarmed([stream for stream in watch(moved, reference, [baseline]) if stream.test.own_baseline])


def test_more_refusals_and_more_corrections_than_promised_alarm() -> None:
    reference = draw_reference()
    found = draw_arrivals(reference, 300)
    refused = replace(found, refused=found.refused | (np.arange(300) % 4 == 0))
    assert alarmed(watch(refused, reference)) == {REFUSALS}
    disputed = replace(found, corrected=np.arange(300) % 2 == 0)
    assert alarmed(watch(disputed, reference)) == {CORRECTIONS}


def test_every_year_begins_anew() -> None:
    reference = draw_reference()
    found = one_after_another(draw_arrivals(reference, 100, brighter=3.0), draw_arrivals(reference, 800, 2, a_day=2))
    streams = [stream for stream in watch(found, reference) if stream.quantity == "mean"]
    assert [stream.year for stream in streams] == [0, 1]
    assert [stream.alarm is None for stream in streams] == [False, True]


def test_the_alarms_of_many_quiet_sites_keep_the_promise() -> None:
    alarms = 0
    for seed in range(40):
        reference: Reference = draw_reference(90, seed)
        alarms += bool(alarmed(watch(draw_arrivals(reference, 200, 1000 + seed), reference)))
    assert alarms <= 6  # two expected at the most; more than six has a chance of 0.3 %
