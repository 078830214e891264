"""How the room is watched: its metrics, and the site's monitor of drift.

Metrics are for Prometheus: counts and times, by route, verdict and reason; nothing of a patient or a reader. `RoomMonitor` passes each new
case, and what a reader found, to the monitor (`pneumofed monitor`); no failure there stops the room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pneumofed.common.errors import PneumofedError
from pneumofed.inference.reading_room.schema import Label
from pneumofed.inference.reading_room.settings import RoomFolder
from pneumofed.inference.reading_room.viewing import JudgedFile

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.inference.monitor.monitor import Monitor

logger = logging.getLogger(__name__)

BUCKETS_SEC = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class RoomMetrics:
    """Counters of one server. `waiting` returns how many files wait for a worker."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pneumofed_requests", "Requests by route and status.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "pneumofed_request_seconds",
            "Time to the first byte of the answer.",
            ["route"],
            buckets=BUCKETS_SEC,
            registry=self._registry,
        )
        self._verdicts = Counter("pneumofed_verdicts", "Images judged, by verdict.", ["verdict"], registry=self._registry)
        self._refused = Counter(
            "pneumofed_refused_files", "Files that could not be used, by reason.", ["reason"], registry=self._registry
        )
        self._findings = Counter(
            "pneumofed_findings", "Findings of readers, by agreement with the model.", ["agrees"], registry=self._registry
        )
        self._unwatched = Counter(
            "pneumofed_monitor_failures", "Cases and findings that the monitor of drift could not take.", registry=self._registry
        )
        Gauge("pneumofed_files_waiting", "Files that wait for a worker.", registry=self._registry).set_function(waiting)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts a request.

        Args:
            method: HTTP method, or `other` for an unknown one.
            route: the route's template, which names no case.
            status: of the answer.
            seconds: from the request to the first byte of the answer.
        """
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def judged(self, verdict: str) -> None:
        self._verdicts.labels(verdict).inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def found(self, agrees: bool | None) -> None:
        self._findings.labels({True: "yes", False: "no", None: "open"}[agrees]).inc()

    def unwatched(self) -> None:
        self._unwatched.inc()

    def text(self) -> bytes:
        """Formats all of it in Prometheus's text format."""
        return generate_latest(self._registry)


def open_monitor(folder: RoomFolder, bundle: Bundle) -> Monitor | None:
    """Opens the monitor that the room's settings name; None where they name none, or where `bundle` has no reference to compare with.

    Args:
        folder: the room's.
        bundle: that judges in this room.
    """
    from pneumofed.inference.monitor.monitor import Monitor

    if folder.settings.monitor is None:
        return None
    try:
        return Monitor.open(folder.inside(folder.settings.monitor), bundle)
    except PneumofedError as error:
        logger.warning("drift is not watched: %s", error)
        return None


class RoomMonitor:
    """The monitor as the room uses it. What goes wrong is logged by its kind, since its text may quote what is in a file.

    Args:
        monitor: of the bundle that judges; None watches nothing.
        failed: called after a failure.
    """

    def __init__(self, monitor: Monitor | None, failed: Callable[[], None]) -> None:
        self._monitor, self._failed = monitor, failed

    def judged(self, file: JudgedFile) -> int | None:
        """Records a judged image; its number in the monitor, or None if it was not recorded."""
        if self._monitor is None:
            return None
        header = file.header
        try:
            return self._monitor.record(file.judgement, file.info, patient=header.patient or header.accession or None)
        except Exception as error:
            self._tell(error)
            return None

    def read(self, image: int | None, label: Label) -> None:
        """Records what a reader found on an image; nothing where the reader is unsure.

        Args:
            image: its number in the monitor; None where it was not recorded.
            label: what the reader says; all but `normal` and `unsure` count as pneumonia.
        """
        if self._monitor is None or image is None or label == "unsure":
            return
        try:
            self._monitor.record_reading(image, "normal" if label == "normal" else "pneumonia")
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        logger.error("the monitor of drift could not be written: %s", type(error).__name__)
        self._failed()
