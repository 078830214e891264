"""Everything that a run needs, checked before one begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

from rich.table import Table
from rich.text import Text

from pneumofed.client.site import checks, connection_checks
from pneumofed.client.site.checks import Kind, PreflightFinding
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.errors import ConfigError

logger = logging.getLogger(__name__)

EXIT_CODES: dict[Kind, int] = {"environment": 10, "keys": 11, "connection": 12, "data": 13, "policy": 14}
LEVEL_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
CHECKS: dict[Kind, Callable[[SiteFolder], Iterable[PreflightFinding]]] = {
    "environment": checks.check_environment,
    "keys": checks.check_site_keys,
    "connection": connection_checks.check_connection,
    "data": checks.check_data,
    "policy": checks.check_policy_file,
}


def run_checks(folder: SiteFolder) -> list[PreflightFinding]:
    """Runs all checks; findings come by kind. A check that fails itself is a problem of its kind, and the others are still made."""
    findings = [finding for kind in CHECKS for finding in _run(kind, folder)]
    return sorted(findings, key=lambda finding: get_args(Kind).index(finding.kind))


def exit_code(findings: Sequence[PreflightFinding]) -> int:
    """0 without a problem, else the code of the first kind that has one: a later kind may suffer from an earlier one."""
    return min((EXIT_CODES[finding.kind] for finding in findings if finding.level == "problem"), default=0)


def findings_table(findings: Sequence[PreflightFinding]) -> Table:
    """The findings for people."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("kind", "check", "", "found, and what to do"):
        shown.add_column(heading, overflow="fold")
    for finding in findings:
        colour = LEVEL_COLOURS[finding.level]
        found = f"{finding.sentence}: {finding.remedy}" if finding.remedy else finding.sentence
        shown.add_row(finding.kind, finding.name, Text(finding.level, colour), found)
    return shown


def _run(kind: Kind, folder: SiteFolder) -> list[PreflightFinding]:
    found: list[PreflightFinding] = []
    try:
        found.extend(CHECKS[kind](folder))
    except ConfigError as error:
        found.append(PreflightFinding(kind, "settings", "problem", str(error), "fix that file"))
    except Exception as error:
        logger.exception("the check of %s failed", kind)
        found.append(
            PreflightFinding(
                kind, "check", "problem", f"could not be made ({type(error).__name__}): {error}", "report it to the developers"
            )
        )
    return found
