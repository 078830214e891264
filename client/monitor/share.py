"""The file that a site may send to the coordinator, and its reading."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from common.data.atomic import atomic_write
from common.drift.reference import Reference
from common.drift.summary import Grid, Summary
from common.errors import MessageError

FORMAT = "pneumofed drift summary 1"
MAX_BYTES = 1_000_000


def write_share(path: Path, site: str, period: tuple[date, date], summary: Summary) -> None:
    """Writes what `site` tells of `period` to `path`, as JSON that a person can read before it is sent.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"format": FORMAT, "site": site, "first": str(period[0]), "last": str(period[1]), **summary.to_numbers()}
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_share(path: Path, reference: Reference) -> tuple[str, tuple[date, date], Summary]:
    """(site, period, summary) in the file `path`.

    Raises:
        MessageError: it is no such file, of another bundle, or contradicts itself.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MessageError(f"{path.name} is too large for a drift summary")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise MessageError(f"{path.name} is no drift summary of this version; ask the site to write it again")
        site, first, last = str(content.pop("site")), *(date.fromisoformat(content.pop(key)) for key in ("first", "last"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"{path.name} cannot be read as a drift summary ({type(error).__name__})") from None
    return site, (first, last), Summary.from_numbers(content, Grid.of(reference))
