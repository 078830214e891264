"""`pneumofed audit`: check and read audit logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pneumofed.common.ops.command_line import FAILURE, Json, print_json, say

app = typer.Typer(no_args_is_help=True, help="Check and read the audit logs of both sides.")


@app.command("verify")
def audit_verify(
    paths: Annotated[list[Path], typer.Argument(help="Audit logs (audit.jsonl).", metavar="PATH...")],
    head: Annotated[list[str] | None, typer.Option(help="A head that must be in the log; may stand more than once.")] = None,
    anchored_by: Annotated[
        Path | None, typer.Option(help="The other side's log: every head that it keeps of this log must be in it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Check the chain of each log; exits with 1 if a line was changed, removed, inserted, moved or cut off."""
    from pneumofed.common.audit.verify import actor_of, anchors_in, verify_log

    reports = []
    for path in paths:
        anchors = anchors_in(anchored_by, actor_of(path) or "") if anchored_by else []
        reports.append(verify_log(path, [*(head or []), *anchors]))
    if json_:
        print_json([{**vars(report), "intact": report.intact} for report in reports])
    for report in [] if json_ else reports:
        say(report.sentence(), style="green" if report.intact else "red")
    if not all(report.intact for report in reports):
        raise typer.Exit(FAILURE)


@app.command("show")
def audit_show(
    path: Annotated[Path, typer.Argument(help="Audit log (audit.jsonl).")],
    json_: Annotated[bool, typer.Option("--json", help="The entries as a JSON list.")] = False,
) -> None:
    """Show the entries of a log, one a line. What is broken is left out: see `verify`."""
    from pneumofed.common.audit.log import read_entries
    from pneumofed.common.audit.verify import verify_log

    report, entries = verify_log(path), read_entries(path)
    if json_:
        print_json([vars(entry) for entry in entries])
        return
    for entry in entries:
        facts = "  ".join(f"{key}={_short(value)}" for key, value in entry.facts.items())
        say(f"{entry.sequence:>5}  {entry.time[:19]}Z  {entry.actor}  {entry.event}  {facts}")
    if not report.intact:
        say(report.sentence(), style="red")


def _short(value: Any) -> str:
    """A value in little room: hashes by their beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "…" if len(text) == 64 and text.isalnum() else text
