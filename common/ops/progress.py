"""How far a long command is: bars on a terminal, a line every ten seconds where there is none, nothing with `--quiet`.

with open_progress() as progress:
    progress.show("images", done, total)     any number of steps, from any thread
    progress.finish("images")

Progress goes to standard error where a result is piped on, so that it never gets into it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from pneumofed.common.ops.command_line import console, errors

LINE_EVERY_SEC = 10.0
"""How often a line is printed where there is no terminal."""


class Progress:
    """The steps that run at the moment. This one shows nothing: for Python callers and `--quiet`."""

    def show(self, step: str, done: float = 0, total: float | None = None, note: str = "") -> None:
        """Begins a step, or says how far it is. One of which all is done ends where another begins.

        Args:
            step: its name, for people.
            done: of `total`; it may be a fraction.
            total: None where nobody knows.
            note: takes the place of `done` of `total` in what is shown.
        """

    def finish(self, step: str) -> None:
        """Ends a step; one that never began is no error."""


NO_PROGRESS = Progress()


@dataclass
class ProgressStep:
    """One step. The time left is estimated from the pace since its first report: what a resumed run had done before counts for nothing.

    Attributes:
        name: for people.
        started: seconds of a monotonic clock at the first report.
        first: what was done then.
        done: of `total`, now.
        total: None where nobody knows.
        note: shown in the place of `done` of `total`.
    """

    name: str
    started: float
    first: float = 0.0
    done: float = 0.0
    total: float | None = None
    note: str = ""

    def left_sec(self, now: float) -> float | None:
        """Estimates the seconds left at the time `now`; None before anything was done, where all is, and without a total."""
        gained = self.done - self.first
        if self.total is None or gained <= 0 or self.done >= self.total:
            return None
        return (self.total - self.done) * (now - self.started) / gained

    @property
    def state(self) -> str:
        """How far the step is, in words."""
        counted = f"{self.done:g}" if self.total is None else f"{self.done:g} of {self.total:g}"
        return self.note or (counted if self.done or self.total else "")

    def times(self, now: float) -> str:
        """Returns the seconds so far and those left, in words, at the time `now`."""
        left = self.left_sec(now)
        return f"{say_seconds(now - self.started)} so far" + (f", about {say_seconds(left)} left" if left is not None else "")

    def line(self, now: float) -> str:
        """Returns the step in one line at the time `now`."""
        return ", ".join(part for part in (f"{self.name}: {self.state}" if self.state else self.name, self.times(now)) if part)


def say_seconds(seconds: float) -> str:
    """Says a time in words: seconds below two minutes, minutes below two hours, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def open_progress(*, quiet: bool = False, results_piped: bool = False) -> Iterator[Progress]:
    """Opens the display that fits where the command's output goes, until the end of the block.

    Args:
        quiet: nothing is shown.
        results_piped: standard output takes a result, such as JSON, and nothing else.
    """
    to = errors if results_piped or not console.is_terminal else console
    if quiet:
        yield NO_PROGRESS
    elif to.is_terminal:
        with _Bars(to) as bars:
            yield bars
    else:
        with Lines(to) as lines:
            yield lines


@contextmanager
def show_sentences(progress: Progress, step: str, say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Shows a step as long as the block runs, for work whose parts nobody can count.

    Args:
        progress: where it is shown.
        step: its name, for people.
        say: takes the sentences about what is done.

    Returns:
        What takes them in the place of `say`: the last sentence is the step's state, too.
    """

    def said(text: str) -> None:
        progress.show(step, note=text)
        say(text)

    progress.show(step)
    try:
        yield said
    finally:
        progress.finish(step)


@dataclass
class _Steps(Progress):
    """Keeps the steps in the order in which they began."""

    to: Console
    steps: dict[str, ProgressStep] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def show(self, step: str, done: float = 0, total: float | None = None, note: str = "") -> None:
        with self.lock:
            if step not in self.steps:
                for over in [name for name, one in self.steps.items() if one.total and one.done >= one.total]:
                    self.finish(over)
            kept = self.steps.setdefault(step, ProgressStep(step, time.monotonic(), first=done))
            kept.done, kept.total, kept.note = done, total, note

    def finish(self, step: str) -> None:
        with self.lock:
            self.steps.pop(step, None)


class Lines(_Steps):
    """Prints all steps that run in one line, every `every_sec` seconds, also when nothing moves; short commands print none."""

    every_sec: float = LINE_EVERY_SEC

    def __enter__(self) -> Lines:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._print, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _print(self) -> None:
        while not self._end.wait(self.every_sec):
            with self.lock:
                text = "; ".join(step.line(time.monotonic()) for step in self.steps.values())
            if text:
                self.to.print(f"    {text}")


class _Times(ProgressColumn):
    """Seconds so far and left, as `ProgressStep` estimates them."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["step"].times(time.monotonic()), style="dim")


class _Bars(_Steps):
    """A bar for each step that runs, at the foot of the terminal; gone at the end."""

    def __enter__(self) -> _Bars:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
        said = TextColumn("{task.fields[step].state}", markup=False)
        self._rich = RichProgress(*columns, said, _Times(), console=self.to, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

    def show(self, step: str, done: float = 0, total: float | None = None, note: str = "") -> None:
        super().show(step, done, total, note)
        with self.lock:
            if step not in self._tasks:
                self._tasks[step] = self._rich.add_task(step, total=total, step=self.steps[step])
            self._rich.update(self._tasks[step], completed=done, total=total)

    def finish(self, step: str) -> None:
        super().finish(step)
        with self.lock:
            if step in self._tasks:
                self._rich.remove_task(self._tasks.pop(step))
