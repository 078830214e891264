"""Everything that a run needs, checked before one begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

from rich.table import Table

from client.checks import connection, data, environment, keys, policy
from client.checks.finding import Finding, Kind
from client.folder import SiteFolder
from common.errors import ConfigError

logger = logging.getLogger(__name__)

EXIT_CODES: dict[Kind, int] = {"environment": 10, "keys": 11, "connection": 12, "data": 13, "policy": 14}
SHOWN = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
CHECKS: dict[Kind, Callable[[SiteFolder], Iterable[Finding]]] = {
    "environment": environment.check,
    "keys": keys.check,
    "connection": connection.check,
    "data": data.check,
    "policy": policy.check,
}


def run_checks(folder: SiteFolder) -> list[Finding]:
    """All findings, by kind. A check that fails itself is a problem of its kind, and the others are made all the same."""
    findings = [finding for kind in CHECKS for finding in _run(kind, folder)]
    return sorted(findings, key=lambda finding: get_args(Kind).index(finding.kind))


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without a problem, else the code of the first kind that has one: a later kind may suffer from an earlier one."""
    return min((EXIT_CODES[finding.kind] for finding in findings if finding.level == "problem"), default=0)


def table(findings: Sequence[Finding]) -> Table:
    """The findings for people."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("kind", "check", "", "found", "what to do"):
        shown.add_column(heading, overflow="fold")
    for finding in findings:
        shown.add_row(finding.kind, finding.name, SHOWN[finding.level], finding.sentence, finding.remedy)
    return shown


def _run(kind: Kind, folder: SiteFolder) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(CHECKS[kind](folder))
    except ConfigError as error:
        found.append(Finding(kind, "settings", "problem", str(error), "mend that file"))
    except Exception as error:
        logger.exception("the check of %s failed", kind)
        found.append(
            Finding(kind, "check", "problem", f"could not be made ({type(error).__name__}): {error}", "tell the developers")
        )
    return found
