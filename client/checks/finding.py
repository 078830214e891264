"""What a check found: one sentence, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["environment", "keys", "connection", "data", "policy"]
Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the preflight. `remedy` says how to mend what is not ok."""

    kind: Kind
    name: str
    level: Level
    sentence: str
    remedy: str = ""
