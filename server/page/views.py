"""What the page shows, read from the registry and the run folder. Nothing is stored; a missing number stays missing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import ExperimentConfig
from common.errors import PneumofedError
from server.activity import EVENTS_FILE, read_activity
from server.page.schema import CurrentRound, Interval, Privacy, RoundLine, RunDetail, RunLine, SiteMetrics
from server.progress import best_round
from server.registry.models import Run, RunState
from server.run_folder import RunFolder
from server.run_signs import read_summary
from server.runs import read_experiment
from server.site_states import round_now

RESULTS = ("auroc", "sensitivity", "specificity", "accuracy")
PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\]\S")
Line = Mapping[str, Any]


def view_line(run: Run, full: bool) -> RunLine:
    """The run in the list. Without `full`, file names are cut out of its reason."""
    return RunLine(**_line(run, full, len(read_lines(run))))


def view_run(run: Run, full: bool) -> RunDetail:
    """The run with its rounds, its sites' numbers and its results."""
    history = read_lines(run)
    experiment = _experiment(run)
    sums = [sum(int(_number(line.get("bytes"), way) or 0) for line in history) for way in ("down", "up")]
    return RunDetail(
        **_line(run, full, len(history)),
        title=experiment.name,
        strategy=experiment.strategy.name,
        model=experiment.model.name,
        seed=experiment.seed,
        round_timeout_sec=experiment.strategy.round_timeout_sec,
        min_sites=experiment.strategy.replies_needed,
        app_hash=run.app_hash,
        round_now=_round_now(run),
        course=[_round(line) for line in history],
        sites=_sites(history),
        results=_results(run),
        best_round=best_round(history),
        privacy=_privacy(history),
        bytes_down=sums[0],
        bytes_up=sums[1],
        seconds=sum(_number(line.get("seconds"), "total") or 0.0 for line in history),
    )


def without_paths(text: str) -> str:
    """`text` up to the first file name in it, which may tell more than an auditor should know."""
    found = PATH.search(text)
    return text if found is None else f"{text[: found.start()].rstrip()} … (the rest names files; the coordinator can see it)"


def read_lines(run: Run) -> list[dict[str, Any]]:
    """The run's history, without lines that are none."""
    lines: list[Any] = RunFolder(Path(run.folder)).read_history()
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("round"), int)]


def _experiment(run: Run) -> ExperimentConfig:
    try:
        return read_experiment(run)
    except PneumofedError:  # a run of an older version, whose schema was another
        return ExperimentConfig()


def _line(run: Run, full: bool, completed: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "reason": run.reason if full else without_paths(run.reason),
        "submitted": run.submitted,
        "started": run.started,
        "ended": run.ended,
        "rounds_completed": completed,
        "rounds": _experiment(run).rounds,
    }


def _round_now(run: Run) -> CurrentRound | None:
    if RunState(run.state).final:
        return None
    found = round_now(read_activity(Path(run.folder) / EVENTS_FILE))
    return CurrentRound(number=found.number, started=found.started, deadline=found.deadline) if found else None


def _round(line: Line) -> RoundLine:
    trouble = {**_dict(line.get("failures")), **_dict(line.get("left_out"))}
    drawn = len(line.get("drawn") or [])
    return RoundLine(
        round=line["round"],
        drawn=drawn,
        good=sum(1 for site in _dict(line.get("sites")).values() if "train" in _dict(site)),
        validation_auroc=_number(line.get("validation"), "auroc"),
        test_auroc=_number(line.get("test"), "auroc"),
        external_auroc=_number(line.get("external"), "auroc"),
        train_loss=_train_loss(line),
        validation_loss=_number(line.get("validation"), "log_loss"),
        test_loss=_number(line.get("test"), "log_loss"),
        external_loss=_number(line.get("external"), "log_loss"),
        seconds=_number(line.get("seconds"), "total"),
        bytes_down=int(_number(line.get("bytes"), "down") or 0),
        bytes_up=int(_number(line.get("bytes"), "up") or 0),
        trouble={str(site): str(reason) for site, reason in trouble.items()},
    )


def _train_loss(line: Line) -> float | None:
    """The sites' training losses, each weighed by its images."""
    trained = [_dict(_dict(site).get("train")) for site in _dict(line.get("sites")).values()]
    pairs = [(_number(site, "num_examples"), _number(site, "train_loss")) for site in trained]
    known = [(images, loss) for images, loss in pairs if images and loss is not None]
    total = sum(images for images, _ in known)
    return sum(images * loss for images, loss in known) / total if total else None


def _sites(history: Sequence[Line]) -> list[SiteMetrics]:
    names = sorted({name for line in history for name in (*_dict(line.get("sites")), *(line.get("drawn") or []))})
    return [_site(name, history) for name in names]


def _site(name: str, history: Sequence[Line]) -> SiteMetrics:
    own = [(line["round"], _dict(_dict(line.get("sites")).get(name))) for line in history]
    took_part = [(number, site) for number, site in own if site]
    number, last = took_part[-1] if took_part else (0, {})
    trained = [_dict(site.get("train")) for _, site in own if site.get("train")]
    train, judged = (trained[-1] if trained else {}), _dict(last.get("validation"))
    return SiteMetrics(
        name=name,
        round=number,
        images=_count(train, "num_examples"),
        train_loss=_number(train, "train_loss"),
        train_sec=_number(train, "train_sec"),
        auroc=_number(judged, "auroc"),
        sensitivity=_number(judged, "sensitivity"),
        specificity=_number(judged, "specificity"),
        validation_images=_count(judged, "n"),
        rounds_answered=len(trained),
        rounds_drawn=sum(name in (line.get("drawn") or []) for line in history),
    )


def _results(run: Run) -> dict[str, dict[str, Interval]]:
    """The final model's results with intervals; nothing before the run has succeeded."""
    if run.state != RunState.SUCCEEDED:
        return {}
    summary = read_summary(RunFolder(Path(run.folder)))
    parts = {name: _dict(summary.get(name)) for name in ("test", "external") if summary.get(name)}
    return {
        name: {key: _interval(part[key]) for key in RESULTS if isinstance(part.get(key), dict)} for name, part in parts.items()
    }


def _interval(found: Line) -> Interval:
    return Interval(value=_number(found, "value"), low=_number(found, "low"), high=_number(found, "high"))


def _privacy(history: Sequence[Line]) -> Privacy:
    """The last epsilon that each site told; without differential privacy no site tells one."""
    spent: dict[str, float] = {}
    for line in history:
        for name, site in _dict(line.get("sites")).items():
            epsilon = _number(_dict(site).get("train"), "epsilon")
            if epsilon is not None:
                spent[str(name)] = epsilon
    return Privacy(epsilon=spent)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(part: Any, key: str) -> int | None:
    value = _number(part, key)
    return None if value is None else int(value)


def _number(part: Any, key: str) -> float | None:
    value = part.get(key) if isinstance(part, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
