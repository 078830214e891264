"""What the page's JSON interface answers. Everything optional is null where it is not known: a number here was measured."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field


class TokenLogin(BaseModel):
    """A token, to be changed for a session."""

    token: str = Field(max_length=512)


class Viewer(BaseModel):
    """Who looks."""

    name: str
    role: str
    csrf: str | None = None


class PageHealth(BaseModel):
    """That the page answers; nothing of the federation, since anybody may ask."""

    status: str = "ok"


class RunLine(BaseModel):
    """A run in the list."""

    name: str
    state: str
    reason: str
    submitted: datetime
    started: datetime | None
    ended: datetime | None
    rounds_completed: int
    rounds: int


class CurrentRound(BaseModel):
    """The round that goes on."""

    number: int
    started: datetime
    deadline: datetime | None


class RoundLine(BaseModel):
    """A completed round: pooled results and what it cost."""

    round: int
    drawn: int
    good: int
    validation_auroc: float | None
    test_auroc: float | None
    external_auroc: float | None
    train_loss: float | None
    validation_loss: float | None
    test_loss: float | None
    external_loss: float | None
    held_out_auroc: dict[str, float | None]
    """By name, of the other held-out sets, as the loss below."""
    held_out_loss: dict[str, float | None]
    seconds: float | None
    bytes_down: int
    bytes_up: int
    trouble: dict[str, str]


class SiteMetrics(BaseModel):
    """A site's numbers in the last round in which it took part."""

    name: str
    round: int
    images: int | None
    train_loss: float | None
    train_sec: float | None
    auroc: float | None
    sensitivity: float | None
    specificity: float | None
    validation_images: int | None
    rounds_answered: int
    rounds_drawn: int


class IntervalView(BaseModel):
    """A result with its confidence interval."""

    value: float | None
    low: float | None
    high: float | None


class PrivacyView(BaseModel):
    """Epsilon spent by site, as the sites report it. Empty means that the run has no differential privacy."""

    epsilon: dict[str, float]


class RunDetail(RunLine):
    """A run in full."""

    title: str
    strategy: str
    model: str
    seed: int
    round_timeout_sec: float
    min_sites: int
    app_hash: str | None
    round_now: CurrentRound | None
    course: list[RoundLine]
    sites: list[SiteMetrics]
    results: dict[str, dict[str, IntervalView]]
    best_round: int
    privacy: PrivacyView
    bytes_down: int
    bytes_up: int
    seconds: float


class SiteLine(BaseModel):
    """A site and what it does now."""

    name: str
    state: str
    detail: str
    fingerprint: str
    first_seen: datetime | None
    last_seen: datetime | None


class ProcessLine(BaseModel):
    """One of the coordinator's processes."""

    name: str
    serving: bool
    detail: str


class Sites(BaseModel):
    """Sites and processes; `taken` is when they were asked last."""

    taken: datetime | None
    sites: list[SiteLine]
    processes: list[ProcessLine]


class EventLine(BaseModel):
    """One line of the activity log."""

    id: int
    time: datetime
    run: str | None
    round: int | None
    site: str | None
    kind: str
    text: str
