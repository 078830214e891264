"""Where a run is, read from its event lines; what was there before this call counts for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.ops.progress import Progress
from pneumofed.server.runs.events import EVENTS_FILE, Activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics, RoundRecord, RoundSeconds, SiteRound, SiteTraining
from pneumofed.simulation.watch import FINAL, ROUND, RUN, RunWatch, describe_round


class Shown(Progress):
    """Keeps what is shown at the moment."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float | None, str]] = {}

    def show(self, step: str, done: float = 0, total: float | None = None, note: str = "") -> None:
        self.steps[step] = done, total, note

    def finish(self, step: str) -> None:
        self.steps.pop(step, None)


def test_a_run_is_followed_by_its_event_lines(tmp_path: Path) -> None:
    activity, shown = Activity(tmp_path / EVENTS_FILE), Shown()
    activity.note("round_started", round=1, sites=["former"])  # of the call before
    watch = RunWatch(RunFolder(tmp_path), 2, lambda _: None, shown)
    activity.note("run_started", round=0, rounds=2)
    activity.note("joined", round=0, site="a")
    watch.move()
    assert shown.steps == {RUN: (0, 2, "hospitals that have joined: 1")}
    activity.note("round_started", round=1, sites=["a", "b"])
    for site in "ab":
        activity.note("asked", round=1, site=site, task="train")
    activity.note("answered", round=1, site="a", task="train")
    watch.move()
    assert shown.steps[ROUND] == (1, 2, "training, 1 of 2 hospitals done")
    assert shown.steps[RUN] == (pytest.approx(0.4), 2, "round 1 of 2")
    activity.note("refused", round=1, site="b", task="train", reason="hours")
    activity.note("round_done", round=1, seconds=1.0)
    activity.note("round_started", round=2, sites=["a"])
    activity.note("asked", round=2, site="a", task="train")
    watch.move()
    assert shown.steps[RUN] == (1.0, 2, "round 2 of 2")
    activity.note("round_done", round=2, seconds=1.0)
    watch.move()
    assert set(shown.steps) == {FINAL}
    activity.note("run_ended", round=2, status="succeeded")
    with watch.moving():
        pass
    assert not shown.steps
    assert 0 <= watch.course.evaluation_sec() < 60


def test_a_line_that_is_half_written_is_taken_when_it_is_whole(tmp_path: Path) -> None:
    path, shown = tmp_path / EVENTS_FILE, Shown()
    watch = RunWatch(RunFolder(tmp_path), 2, lambda _: None, shown)
    Activity(path).note("joined", round=0, site="a")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    watch.move()
    assert shown.steps[RUN][2] == "hospitals that have joined: 0"
    path.write_bytes(whole)
    watch.move()
    assert shown.steps[RUN][2] == "hospitals that have joined: 1"


def test_a_rounds_line_says_what_was_judged_in_it_and_nothing_of_what_was_not() -> None:
    trained = {site: SiteRound(train=SiteTraining(num_examples=1)) for site in "ab"}
    line = RoundRecord(round=1, drawn=("a", "b"), sites=trained, seconds=RoundSeconds(total=2.0))
    assert describe_round(line, 12) == "round   1/12  2/2 sites  2.0 s"
    judged = line.updated(validation=Metrics(auroc=0.75), test=Metrics(auroc=0.5))
    assert describe_round(judged, 12) == "round   1/12  2/2 sites  AUROC validation 0.7500  test 0.5000  2.0 s"
