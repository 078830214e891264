"""Metrics of the room for Prometheus: counts and times, by route, verdict and reason. Nothing of a patient or a reader."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
