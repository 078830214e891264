"""How a run ended: never better than it was, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from server.report_run import STATUSES, Run

IN_ROUND = re.compile(r"round (\d+): ")
SITE_BREAK = re.compile(r"; (?=(?:node )?[A-Za-z0-9][\w.-]*: )")
"""Between the sites that a `RoundError` names."""
NO_END = "The run folder tells of no end: the run is still going on, or its process was killed."


@dataclass(frozen=True)
class Ending:
    """A badge, and for a run that did not succeed the reason, the sites named, and what to do."""

    status: str
    badge: str
    reason: str = ""
    sites: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def describe_ending(run: Run) -> Ending:
    """The ending as the summary tells it; a run whose summary tells of none counts as unfinished."""
    if run.status == "succeeded":
        return Ending(run.status, STATUSES[run.status])
    error = run.summary.error or NO_END
    badge = f"{STATUSES.get(run.status, 'Not finished')}, {_when(run, error)}"
    reason, separator, named = IN_ROUND.sub("", error, count=1).partition("(strategy.min_sites). ")
    sites = tuple(SITE_BREAK.split(named)) if named else ()
    text = reason + separator.strip()
    return Ending(run.status, badge, text[0].upper() + text[1:], sites, tuple(_advice(run, sites)))


def _when(run: Run, error: str) -> str:
    in_round = IN_ROUND.match(error)
    if in_round:
        return f"in round {in_round[1]}"
    if run.is_final("test") or run.is_final("external"):
        return "after the last round"
    return f"after round {run.completed}" if run.completed else "before the end of the first round"


def _advice(run: Run, sites: tuple[str, ...]) -> list[str]:
    advice = []
    if sites:
        advice.append(
            "Look into the log of each site named above (site.log in its own work folder): the details stand only there."
        )
        advice.append("If fewer sites are enough, lower strategy.min_sites; that is another experiment and needs a new run.")
    if (run.folder.path / "flower.log").exists():
        advice.append("flower.log in the run folder holds what Flower itself said.")
    if run.completed:
        advice.append(f"The {run.completed} completed rounds are kept: --resume goes on after them.")
    else:
        advice.append("No round was completed, so there is nothing to resume: start anew in an empty folder.")
    return advice
