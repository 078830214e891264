"""Verification of an audit log: the first line that breaks the chain, how it does, and heads that another party knows and the log lacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pneumofed.common.audit.log import CHAIN_START, AuditEntry, parse_line, read_entries
from pneumofed.common.errors import AuditError, counted

Damage = Literal["changed", "removed", "inserted", "reordered", "truncated"]

DAMAGE_SENTENCES: dict[Damage, str] = {
    "changed": "it is not as it was written, or the line before it was replaced",
    "removed": "lines before it are missing",
    "inserted": "it does not belong here",
    "reordered": "it stands before a line that it follows",
    "truncated": "the log ends too early",
}


@dataclass(frozen=True)
class AuditReport:
    """The result for one log. `line` counts from 1; it and `damage` are None where the chain holds."""

    path: Path
    lines: int
    head: str | None
    line: int | None = None
    damage: Damage | None = None
    missing_heads: tuple[str, ...] = ()
    """Heads that were known and that no line of the log has: lines were cut off at its end, or it was written anew."""

    @property
    def intact(self) -> bool:
        return self.damage is None

    def sentence(self) -> str:
        """The result in one sentence."""
        if self.damage is None:
            return f"{self.path}: {counted(self.lines, 'line')}, unbroken, head {self.head or 'none'}"
        if self.missing_heads:
            return f"{self.path}: the known head {self.missing_heads[0]} is not among its {self.lines} lines: cut at the end or rewritten"
        return f"{self.path}: broken at line {self.line} ({self.damage}): {DAMAGE_SENTENCES[self.damage]}"


def verify_log(path: Path, heads: Sequence[str] = ()) -> AuditReport:
    """Checks the chain of the log at `path`, and that each of `heads` is the hash of one of its lines.

    Law: of a sound log, any one line that is changed, removed, inserted or swapped with its neighbour makes the report not intact.
    Only a removed last line needs a head to be noticed.

    Args:
        path: the log.
        heads: hashes that are known from elsewhere, such as those that the other party's log keeps (`anchors_in`).

    Returns:
        The report; a broken chain is a result and raises nothing.

    Raises:
        AuditError: the file is missing or cannot be read.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise AuditError(f"{path} cannot be read: {error.strerror}; check the path, its owner and permissions") from error
    entries = [parse_line(line) for line in lines]
    for number in range(len(lines)):
        damage = _damage_at(number, lines[number], entries)
        if damage:
            return AuditReport(Path(path), len(lines), _head(entries[:number]), number + 1, damage)
    return _with_heads(AuditReport(Path(path), len(lines), _head(entries)), entries, heads)


def anchors_in(path: Path, actor: str) -> list[str]:
    """Reads the heads of `actor`'s log that the other party's log keeps, in the fact `heads`: {actor: head}.

    Args:
        path: the other party's log; one that does not exist keeps none.
        actor: whose heads.

    Returns:
        The heads, oldest first.

    Raises:
        AuditError: the file cannot be read.
    """
    heads = (entry.facts.get("heads") for entry in read_entries(path))
    return [found[actor] for found in heads if isinstance(found, dict) and isinstance(found.get(actor), str)]


def actor_of(path: Path) -> str | None:
    """Reads who wrote the log at `path`; None where it has no sound line."""
    return next((entry.actor for entry in read_entries(path)), None)


def _damage_at(number: int, line: bytes, entries: Sequence[AuditEntry | None]) -> Damage | None:
    entry, before = entries[number], entries[number - 1] if number else None
    if entry is None:
        return "truncated" if number == len(entries) - 1 and not line.endswith(b"\n") else "changed"
    expected = before.sequence + 1 if before else 1
    if entry.sequence == expected:
        return None if entry.previous == (before.hash if before else CHAIN_START) else "changed"
    if entry.sequence < expected:
        return "inserted"
    late = any(other is not None and other.sequence == expected for other in entries[number + 1 :])
    return "reordered" if late else "removed"


def _with_heads(report: AuditReport, entries: Iterable[AuditEntry | None], heads: Sequence[str]) -> AuditReport:
    known = {entry.hash for entry in entries if entry}
    missing = tuple(head for head in heads if head not in known)
    if not missing:
        return report
    return AuditReport(report.path, report.lines, report.head, report.lines + 1, "truncated", missing)


def _head(entries: Sequence[AuditEntry | None]) -> str | None:
    return entries[-1].hash if entries and entries[-1] else None
