"""Follows a run by what it writes: a sentence for each round as its line comes, and how far the round is by the event lines.

Both engines write the same lines (`server.runs.events`), so nothing of the run has to report here.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.server.runs.events import EVENTS_FILE, TASK_WORDS, Kind, parse_activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord

Say = Callable[[str], None]
READ_EVERY_SEC = 0.5
RUN, ROUND, FINAL = "run", "round", "final evaluation"
TRAINING_SHARE, EVALUATION_SHARE = 0.8, 0.15
"""Of a round's time, roughly; the rest is the central evaluation. Only the bar within a round rests on it."""


@dataclass
class RunCourse:
    """Where a run is, by its events.

    Attributes:
        rounds: how many are planned.
        round: the one that runs; 0 before the first.
        completed: how many are over.
        task: what the sites were last asked for.
        asked, answered: sites by task of this round; a site that refused, failed or was lost counts as answered.
        joined: sites that answered the roll call.
        last_round_end, end: times of the last completed round and of the run's end, as the events have them.
    """

    rounds: int
    round: int = 0
    completed: int = 0
    task: str = ""
    asked: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    answered: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    joined: set[str] = field(default_factory=set)
    last_round_end: str | None = None
    end: str | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Takes the next event line."""
        kind, site, task = event["kind"], str(event.get("site")), str(event.get("task"))
        if kind == Kind.RUN_RESUMED:
            self.completed = event["round"]
        elif kind == Kind.JOINED:
            self.joined.add(site)
        elif kind == Kind.ROUND_STARTED:
            self.round, self.task = event["round"], ""
            self.asked.clear()
            self.answered.clear()
            if at_work := event.get("at_work"):  # in asynchronous rounds, since an earlier one
                self.asked["train"] = set(map(str, at_work))
        elif kind == Kind.ASKED:
            self.task = task
            self.asked[task].add(site)
        elif kind in (Kind.ANSWERED, Kind.LATE, Kind.REFUSED, Kind.LOST, Kind.FAILED):
            self.answered[task].add(site)
        elif kind == Kind.ROUND_DONE:
            self.completed, self.last_round_end = event["round"], event["time"]
        elif kind == Kind.RUN_ENDED:
            self.end = event["time"]

    @property
    def runs_round(self) -> bool:
        return self.round > self.completed and self.end is None

    def share_of_round(self) -> float:
        """The part of the round that is over, in [0, 1]."""
        shares = (("train", TRAINING_SHARE), ("evaluate", EVALUATION_SHARE))
        return sum(share * len(self.answered[task]) / max(len(self.asked[task]), 1) for task, share in shares)

    def evaluation_sec(self) -> float:
        """Seconds from the end of the last round to the end of the run; 0 of a run that has not come so far."""
        if self.last_round_end is None or self.end is None:
            return 0.0
        return max((datetime.fromisoformat(self.end) - datetime.fromisoformat(self.last_round_end)).total_seconds(), 0.0)

    def show(self, progress: Progress) -> None:
        """Shows the run and its round."""
        if self.end is not None or (self.completed >= self.rounds > 0):
            progress.finish(ROUND)
            progress.finish(RUN)
            progress.finish(FINAL) if self.end else progress.show(FINAL)
        elif self.runs_round:
            done, asked = len(self.answered[self.task]), len(self.asked[self.task])
            words = TASK_WORDS.get(self.task, "its messages")
            evaluated = self.task == "evaluate" and done == asked
            progress.show(RUN, self.round - 1 + self.share_of_round(), self.rounds, f"round {self.round} of {self.rounds}")
            progress.show(ROUND, done, asked, "held-out images" if evaluated else f"{words}, {done} of {asked} hospitals done")
        elif not self.round:
            progress.show(RUN, self.completed, self.rounds, f"hospitals that have joined: {len(self.joined)}")


class RunWatch:
    """Watches one run folder: called, it says the rounds that are new; within `moving`, the display follows the events.

    A round whose model is judged with the next one's training (`evaluation.with_training`) is said when it was.
    """

    def __init__(self, folder: RunFolder, rounds: int, say: Say, progress: Progress = NO_PROGRESS) -> None:
        self.course = RunCourse(rounds)
        self._folder, self._say, self._progress = folder, say, progress
        self._reported = len(self._settled(0))
        self._events = folder.path / EVENTS_FILE
        self._read_to = self._events.stat().st_size if self._events.exists() else 0

    def __call__(self) -> None:
        lines = self._settled(self._reported)
        for line in lines:
            self._say(describe_round(line, self.course.rounds))
        self._reported += len(lines)

    def _settled(self, after: int) -> list[RoundRecord]:
        return [line for line in self._folder.read_history(after) if not line.judged_later]

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Follows the events in a thread while its block runs, since the local engine has the main thread for itself."""
        end = threading.Event()

        def follow() -> None:
            while not end.wait(READ_EVERY_SEC):
                self.move()

        thread = threading.Thread(target=follow, name="run-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            self.move()
            for step in (ROUND, RUN, FINAL):
                self._progress.finish(step)

    def move(self) -> None:
        """Takes the events that are new and shows where the run is. A file that cannot be read costs the display, not the run."""
        before = self.course.round, self.course.task
        for event in parse_activity(self._new_text(self._events)):
            self.course.take(event)
        if before != (self.course.round, self.course.task):
            self._progress.finish(ROUND)  # its time is that of one task
        self.course.show(self._progress)

    def _new_text(self, path: Path) -> str:
        """The whole lines that were added since the last call."""
        try:
            with path.open("rb") as file:
                file.seek(self._read_to)
                added = file.read()
        except OSError:
            return ""
        whole = added[: added.rfind(b"\n") + 1]
        self._read_to += len(whole)
        return whole.decode("utf-8", errors="replace")


def describe_round(line: RoundRecord, rounds: int) -> str:
    """Describes a round in one line of text, and one more for each site in trouble.

    Args:
        line: the round's record.
        rounds: how many there are in all.
    """
    shown = [f"{name} {found.auroc:.4f}" for name, found in line.measured.items() if found.auroc is not None]
    trouble = "".join(f"\n    {site}: {reason}" for site, reason in {**line.trouble, **line.absent}.items())
    sites = f"{len(line.trained)}/{len(line.drawn)} sites"
    stale = ", ".join(f"{site} {rounds}" for site, rounds in line.stale.items())
    sites += f" (rounds old: {stale})" if stale else ""
    areas = f"AUROC {'  '.join(shown)}  " if shown else ""  # a round that nobody judged has none
    return f"round {line.round:>3}/{rounds}  {sites}  {areas}{line.seconds.total or 0.0:.1f} s{trouble}"
