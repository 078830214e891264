"""Tracking of a run from beside it: its folder is read, whoever writes it, and what is new goes to each target.

    with following(folder, tracking): ...       while the block runs the run in `folder` is tracked, and at its end its results are
    with TrackedGroup(folder, targets): ...     the same of a sweep: its runs as one group, and what it has chosen

Nothing of the run waits for a target but `END_SEC` at its end, and nothing that a target does changes the run: each has a thread of its
own, a failure is one warning that says what to do, and is tried again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from pneumofed.common.errors import ConfigError, PneumofedError
from pneumofed.common.folder_lock import owned
from pneumofed.common.ops.command_line import note
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RunState
from pneumofed.server.tracking.facts import TrackedFacts, gather_facts, sweep_facts
from pneumofed.server.tracking.targets import (
    TrackedRun,
    Tracking,
    TrackingTarget,
    find_targets,
    register,
)

LOOK_SEC = 1.0
"""How often the run folder is looked at."""
RETRY_SEC = 30.0
"""After a failure."""
END_SEC, STOPPED_SEC = 20.0, 5.0
"""How long the end of a run waits for all targets together; after Ctrl-C."""
Warn = Callable[[str], None]


class Destination(Protocol):
    """A run at one target."""

    def send(self, facts: TrackedFacts, over: bool) -> None:
        """Sends what the target does not have.

        Args:
            facts: of the run now.
            over: whether the run has ended.

        Raises:
            TrackingError: it takes nothing.
        """
        ...

    def close(self) -> None:
        """Lets go of connections and files."""
        ...


def open_destination(target: TrackingTarget, tracked: TrackedRun, folder: RunFolder) -> Destination:
    """Opens the run at a target; nothing is sent yet.

    Args:
        target: where.
        tracked: the run's mark and name.
        folder: of the run.

    Raises:
        TrackingError: it cannot be opened.
    """
    if target.kind == "tensorboard":
        from pneumofed.server.tracking.tensorboard import TensorboardRun

        return TensorboardRun(target, tracked, folder)
    from pneumofed.server.tracking.mlflow import MlflowRun

    return MlflowRun(target, tracked)


class Follower:
    """One target of one run, in a thread of its own.

    Args:
        target: where.
        tracked: the run's mark and name.
        folder: of the run.
        warn: takes the one sentence about a failure.
        read: gives what there is to track; of the run folder without it.
    """

    def __init__(
        self,
        target: TrackingTarget,
        tracked: TrackedRun,
        folder: RunFolder,
        warn: Warn,
        read: Callable[[], TrackedFacts | None] | None = None,
    ) -> None:
        self._target, self._tracked, self._folder, self._warn = target, tracked, folder, warn
        self._read = read or (lambda: gather_facts(folder, tracked))
        self._destination: Destination | None = None
        self._end = threading.Event()
        self._given_up = False
        self._sent: object = None
        self._next_try = 0.0
        self.problem = ""
        """The first failure; empty without one."""
        self.complete = False
        """Whether the target has the end of the run."""
        self._thread = threading.Thread(target=self._follow, name=f"track-{target.kind}", daemon=True)

    def start(self) -> None:
        """Begins to follow."""
        self._thread.start()

    def end(self) -> None:
        """Asks for the end of the run to be sent, without waiting for it."""
        self._end.set()

    def wait(self, seconds: float) -> None:
        """Waits for the end to be sent; what has not happened by then is given up, and said."""
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._given_up = True
            self._report("has not taken the end of the run in time: see whether it answers at all")
            self._close()  # what it is at breaks off, so that it sends nothing beside a later attempt
        elif self.complete and self.problem:
            self._warn(f"tracking: {self._target} has all of the run now")

    def try_once(self, over: bool) -> None:
        """Sends what is new, and reports a failure.

        Args:
            over: whether the run has ended.
        """
        stamp = self._stamp()
        if self._given_up or (not over and (stamp == self._sent or time.monotonic() < self._next_try)):
            return
        try:
            self._send(over)
            self._sent, self.complete = stamp, over
        except Exception as error:  # whatever a target or a library does, the run goes on
            own = error if isinstance(error, PneumofedError) else None
            self._report(str(own) if own else f"failed ({type(error).__name__})")
            self._close()
            self._next_try = time.monotonic() + RETRY_SEC

    def _send(self, over: bool) -> None:
        facts = self._read()
        if facts is None:
            return
        if self._destination is None:
            self._destination = open_destination(self._target, self._tracked, self._folder)
        self._destination.send(facts, over)

    def _follow(self) -> None:
        while not self._end.is_set():
            self.try_once(over=False)
            self._end.wait(LOOK_SEC)
        self.try_once(over=True)
        self._close()

    def _close(self) -> None:
        if self._destination is not None:
            self._destination.close()
        self._destination = None

    def _report(self, problem: str) -> None:
        if not self.problem:
            self.problem = problem
            self._warn(
                f"tracking: {self._target} {problem}. The run goes on all the same; what is missing is tried again, and "
                f"`pneumofed track {self._folder.path}` sends it later"
            )

    def _stamp(self) -> object:
        return last_change(self._folder)


def last_change(folder: RunFolder) -> tuple[int, ...]:
    """Returns the times of change of the files that tracking reads, in nanoseconds; 0 for one that is not there."""
    return tuple(changed_at(path) for path in (folder.config, folder.history, folder.last_checkpoint, folder.summary))


def changed_at(path: Path) -> int:
    """Returns when the file was changed, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def open_targets(folder: RunFolder, tracking: Tracking, warn: Warn = note) -> tuple[TrackedRun | None, list[TrackingTarget]]:
    """Finds where the run in `folder` is tracked, and as what; nowhere, with a warning, where the folder does not say or keep it.

    Args:
        folder: of the run; made if it is missing.
        tracking: what is asked for.
        warn: takes a sentence about what is wrong.
    """
    try:
        tracked = register(folder.path, tracking)
        return tracked, find_targets(tracked, tracking.targets) if tracked else []
    except (PneumofedError, OSError) as error:
        why = str(error) if isinstance(error, PneumofedError) else f"{folder.path} cannot be written"
        warn(f"tracking: {why}. The run goes on and is not tracked; `pneumofed track {folder.path}` sends it later")
        return None, []


@contextmanager
def following(folder: RunFolder, tracking: Tracking, warn: Warn = note) -> Iterator[None]:
    """Tracks the run in `folder` while the block runs, at the targets that are asked for or that its folder names.

    Args:
        folder: of the run.
        tracking: what is asked for.
        warn: takes a sentence about a target that fails.
    """
    tracked, targets = open_targets(folder, tracking, warn)
    with ExitStack() as held:
        if tracked and targets:
            try:
                held.enter_context(tracking_alone(folder))
            except ConfigError as error:
                warn(f"tracking: {error}. This process leaves it to that one")
                targets = []
        followers = [Follower(target, tracked, folder, warn) for target in targets] if tracked else []
        for follower in followers:
            follower.start()
        patience = END_SEC
        try:
            yield
        except KeyboardInterrupt:
            patience = STOPPED_SEC
            raise
        finally:
            _end(followers, patience)


def tracking_alone(folder: RunFolder) -> AbstractContextManager[None]:
    """Owns the tracking of a run while the block runs: two at once would both send what they see missing.

    Raises:
        ConfigError: another process has it.
    """
    return owned(folder.path, "tracking", "tracking", "it is tracked there until the run is over, or that process ends")


def _end(followers: list[Follower], patience_sec: float) -> None:
    for follower in followers:
        follower.end()
    deadline = time.monotonic() + patience_sec
    for follower in followers:
        follower.wait(deadline - time.monotonic())


class TrackedGroup:
    """A sweep at its targets: each run is one of a group, and held-out results stay closed there too until the choice is made.

    Args:
        folder: of the sweep.
        given: targets that are asked for; those that the folder names are used too.
    """

    def __init__(self, folder: Path, given: Sequence[TrackingTarget]) -> None:
        self._folder = RunFolder(folder)
        self._tracked, self._targets = open_targets(self._folder, Tracking(tuple(given)))

    def member(self, name: str) -> Tracking:
        """Returns how the group's run `name` is tracked."""
        if self._tracked is None:
            return Tracking()
        return Tracking(tuple(self._targets), name, (self._tracked.run, self._tracked.name), held_out=False)

    def catch_up(self, folder: RunFolder, name: str) -> None:
        """Sends what is missing of a run that is over.

        Args:
            folder: of the run.
            name: in the group.
        """
        if self._targets:
            with following(folder, self.member(name)):
                pass

    def finish(self, study: str, numbers: Mapping[str, float], tags: Mapping[str, str], state: RunState) -> None:
        """Sends what the sweep itself has found, as a run above its runs.

        Args:
            study: name of the experiment.
            numbers: of the chosen setting.
            tags: what was chosen.
            state: how the sweep has ended.
        """
        if self._tracked is None:
            return
        tracked, facts = self._tracked, sweep_facts(study, self._tracked.name, numbers, tags, state)
        followers = [Follower(target, tracked, self._folder, note, lambda: facts) for target in self._targets]
        for follower in followers:
            follower.end()
            follower.start()
        _end(followers, END_SEC)
