"""The monitor's page: one HTML file that needs nothing else, and its first picture as PNG."""

from __future__ import annotations

import base64
from datetime import UTC, date, datetime
from pathlib import Path

from client.monitor.monitor import LOOKED_BACK_DAYS, DriftFindings
from client.monitor.pictures import draw_days, draw_evidence
from client.monitor.telling import sentences, show_p, tell
from common.data.atomic import atomic_write
from common.drift.reference import Reference
from common.drift.watch import RATE
from common.render import render as render_page

SHOWN_DAYS = 14
PAGE_NAME, PICTURE_NAME = "drift.html", "drift.png"


def write_drift_page(folder: Path, findings: DriftFindings, reference: Reference) -> tuple[Path, Path | None]:
    """Writes `drift.html`, and `drift.png` beside it, into `folder`; returns their paths, the second None where nothing was judged.

    Raises:
        OSError: the folder cannot be written.
    """
    from common.evaluation.figures import render

    scanners = tell(findings, reference)
    evidence = render(draw_evidence(findings, scanners)) if scanners else None
    days = draw_days(findings.looks, scanners)
    folder.mkdir(parents=True, exist_ok=True)
    page = _render(findings, reference, [evidence, render(days) if days else None])
    picture = folder / PICTURE_NAME if evidence else None
    for path, content in ((folder / PAGE_NAME, page.encode()), (picture, evidence)):
        if path is not None and content is not None:
            with atomic_write(path) as file:
                file.write(content)
    return folder / PAGE_NAME, picture


def _render(findings: DriftFindings, reference: Reference, pictures: list[bytes | None]) -> str:
    scanners = tell(findings, reference)
    days = sorted({seen.day for seen in findings.looks})[-SHOWN_DAYS:]
    return render_page(
        __package__,
        "monitor.html",
        {"p": show_p, "day": lambda ordinal: f"{date.fromordinal(ordinal):%d %b %Y}"},
        scanners=scanners,
        sentences=sentences(findings, scanners),
        alarm=bool(findings.alarms),
        rate=RATE,
        reference=reference,
        looks=sorted((seen for seen in findings.looks if seen.day in days), key=lambda seen: (-seen.day, seen.scanner)),
        back_days=LOOKED_BACK_DAYS,
        pictures=[f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else "" for png in pictures],
        written=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
    )
