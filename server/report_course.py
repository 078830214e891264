"""The course of the run as the report shows it: what went wrong, on what it ran, and how to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.records import RoundRecord
from server.report_numbers import DASH, count
from server.report_run import Run


@dataclass(frozen=True)
class Incident:
    """What went wrong at one site, and in which rounds."""

    site: str
    what: str
    reason: str
    rounds: str


def describe_course(run: Run) -> str:
    """How many rounds were run of how many, and why not all, in a sentence or two."""
    planned = run.experiment.rounds if run.experiment else None
    troubled = [line.round for line in run.history if line.trouble]
    text = f"{run.completed} of {planned} rounds were completed" if planned else f"{count(run.completed, 'round')} were completed"
    if run.status == "succeeded" and planned and run.completed < planned:
        text += ": the run stopped early, since validation AUROC no longer grew"
    if not run.completed:
        return text + "."
    return text + (
        f". Not every hospital replied well in {_rounds(troubled)}."
        if troubled
        else ", and every hospital that was asked replied well."
    )


def _rounds(numbers: Sequence[int]) -> str:
    return f"round{'' if len(numbers) == 1 else 's'} {spans(numbers)}"


def incidents(history: Iterable[RoundRecord]) -> list[Incident]:
    """Every failure and left-out reply, one row for each site and reason."""
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for line in history:
        for reasons, what in ((line.failures, "no answer"), (line.left_out, "reply left out")):
            for site, reason in reasons.items():
                rounds.setdefault((site, what, reason), []).append(line.round)
    return [Incident(*key, rounds=spans(numbers)) for key, numbers in sorted(rounds.items())]


def spans(numbers: Sequence[int]) -> str:
    """`3, 5–7` for rising numbers 3, 5, 6, 7."""
    groups: list[list[int]] = []
    for n in numbers:
        if groups and n == groups[-1][-1] + 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}{DASH}{group[-1]}" for group in groups)


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """What the coordinator ran on."""
    told = run.environment
    rows = {
        "Python": told.get("python"),
        "System": told.get("platform"),
        "CPU": _cpu(told),
        "Accelerator": told.get("accelerator"),
    }
    rows |= dict((told.get("packages") or {}).items())
    return [(name, str(value)) for name, value in rows.items() if value]


def _cpu(told: Mapping[str, Any]) -> str:
    parts = [told.get("cpu"), told.get("cpus") and count(told["cpus"], "CPU"), told.get("cpu_capability")]
    return ", ".join(str(part) for part in parts if part)


def command(run: Run) -> str:
    """The command line that lays out the same virtual hospitals; empty where it cannot be told."""
    told = run.simulation
    if told.get("command") or not told.get("data"):
        return str(told.get("command") or "")
    options = {key: told.get(key) for key in ("data", "external", "hospitals", "partition", "alpha", "threads")}
    parts = ["pneumofed", "simulate", "--config", str(run.folder.config.name)]
    parts += [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]
    parts += ["--baselines"] if run.summary.baselines else []
    return shlex.join([*parts, "--out", "NEW-FOLDER"])
