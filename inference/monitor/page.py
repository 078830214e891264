"""The monitor's page: one HTML file that needs nothing else, with its first picture as a PNG file beside it.

The pictures are the evidence over days (`draw_evidence`) and the single days (`draw_days`), a panel for each scanner.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumofed.common.evaluation.plots import FAINT, INK, TEXT_PT, new_figure, style_of
from pneumofed.common.files import atomic_write
from pneumofed.common.ops.render import render as render_page
from pneumofed.inference.monitor.monitor import TESTED_BACK_DAYS, DriftFindings
from pneumofed.inference.monitor.reference import Reference
from pneumofed.inference.monitor.streams import FALSE_ALARM_RATE, DailyTest, Stream
from pneumofed.inference.monitor.wording import ScannerStatus, describe_scanners, sentences, show_p, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TABLE_DAYS = 14
PAGE_NAME, PICTURE_NAME = "drift.html", "drift.png"

MAX_PANELS = 3
NAMED_STREAMS = 4
LOWEST_DRAWN_P = 1e-8
MIN_AXIS_DAYS = 7.0
"""Width of a picture; matplotlib would give a single day six years."""


def write_drift_page(folder: Path, findings: DriftFindings, reference: Reference) -> tuple[Path, Path | None]:
    """Writes `drift.html` and the picture `drift.png` into `folder`.

    Args:
        folder: made if missing; files of an earlier page are replaced.
        findings: of `find_drift`.
        reference: of the same bundle.

    Returns:
        Paths of the page and of the picture, the second None where nothing was judged.

    Raises:
        OSError: the folder cannot be written.
    """
    from pneumofed.common.evaluation.plots import render_figure

    scanners = describe_scanners(findings, reference)
    evidence = render_figure(draw_evidence(findings, scanners)) if scanners else None
    days = draw_days(findings.daily_tests, scanners)
    folder.mkdir(parents=True, exist_ok=True)
    page = _render(findings, reference, [evidence, render_figure(days) if days else None])
    picture = folder / PICTURE_NAME if evidence else None
    for path, content in ((folder / PAGE_NAME, page.encode()), (picture, evidence)):
        if path is not None and content is not None:
            with atomic_write(path) as file:
                file.write(content)
    return folder / PAGE_NAME, picture


def _render(findings: DriftFindings, reference: Reference, pictures: list[bytes | None]) -> str:
    scanners = describe_scanners(findings, reference)
    days = sorted({seen.day for seen in findings.daily_tests})[-TABLE_DAYS:]
    return render_page(
        __package__,
        "monitor.html",
        {"p": show_p, "day": lambda ordinal: f"{date.fromordinal(ordinal):%d %b %Y}"},
        scanners=scanners,
        sentences=sentences(findings, scanners),
        alarm=bool(findings.alarms),
        rate=FALSE_ALARM_RATE,
        reference=reference,
        daily_tests=sorted(
            (seen for seen in findings.daily_tests if seen.day in days), key=lambda seen: (-seen.day, seen.scanner)
        ),
        back_days=TESTED_BACK_DAYS,
        pictures=[f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else "" for png in pictures],
        written=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
    )


def draw_evidence(findings: DriftFindings, scanners: Sequence[ScannerStatus]) -> Figure:
    """Draws a panel for each of the first scanners: the p-value of each quantity over days, those with most evidence named.

    Args:
        findings: of `find_drift`.
        scanners: in the order of the page, at least one; `MAX_PANELS` are drawn.
    """
    shown = scanners[:MAX_PANELS]
    figure, axes = new_figure(len(shown))
    for ax, scanner in zip(axes, shown, strict=True):
        streams = sorted((s for s in findings.current if s.scanner == scanner.name), key=lambda stream: stream.p_value)
        for rank, stream in reversed(list(enumerate(streams))):
            _draw_course(ax, stream, rank)
        _finish(ax, scanner.name)
    _format_days(axes[-1])
    return figure


def draw_days(tests: Sequence[DailyTest], scanners: Sequence[ScannerStatus]) -> Figure | None:
    """Draws a panel for each of the first scanners: days across, quantities down, dark where the day's adjusted p-value is small.

    None where no day had patients enough to be tested.

    Args:
        tests: the tested days of all scanners.
        scanners: in the order of the page; `MAX_PANELS` are drawn, those without a tested day left out.

    Returns:
        None where no day had patients enough to be tested.
    """
    tested = {scanner.name: [seen for seen in tests if seen.scanner == scanner.name and seen.p_values] for scanner in scanners}
    shown = [(name, days) for name, days in tested.items() if days][:MAX_PANELS]
    if not shown:
        return None
    figure, axes = new_figure(len(shown))
    for ax, (name, days) in zip(axes, shown, strict=True):
        drawn = _draw_days(ax, name, days)
    _format_days(axes[-1])
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("p-value of the day", fontsize=TEXT_PT, color=INK)
    bar.ax.set_yticks(
        [0, -np.log10(FALSE_ALARM_RATE), 2, 4], ["1", f"{FALSE_ALARM_RATE:g}", "0.01", "0.0001"], fontsize=TEXT_PT - 1
    )
    return figure


def _draw_course(ax: Axes, stream: Stream, rank: int) -> None:
    """The p-value after each day, the smallest so far: evidence that was there is not taken back."""
    from matplotlib.dates import date2num

    best = np.maximum.accumulate(stream.log_evidence)
    last = np.flatnonzero(np.diff(stream.days, append=stream.days[-1] + 1))
    p_values = np.clip(FALSE_ALARM_RATE * np.exp(np.clip(stream.log_limit - best[last], -50.0, 50.0)), LOWEST_DRAWN_P, 1.0)
    named = rank < NAMED_STREAMS and stream.p_value < 0.5
    look = {**style_of(rank), "linewidth": 1.6, "label": title(stream.quantity)} if named else {"color": FAINT, "linewidth": 0.7}
    marker = "o" if len(last) == 1 else ""  # a single day has no line
    ax.plot(date2num([date.fromordinal(int(day)) for day in stream.days[last]]), p_values, marker=marker, markersize=5, **look)


def _finish(ax: Axes, name: str) -> None:
    ax.axhline(FALSE_ALARM_RATE, color="#a3201d", linewidth=1.0)
    ax.set(yscale="log", ylim=(LOWEST_DRAWN_P, 1.6))
    ax.invert_yaxis()
    ax.set_ylabel("p-value so far")
    ax.set_title(name.replace("$", r"\$"), loc="left", fontsize=TEXT_PT)
    ax.annotate("alarm", (1.0, FALSE_ALARM_RATE), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                fontsize=TEXT_PT - 1, color="#a3201d")  # fmt: skip
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=TEXT_PT - 1.5, frameon=False, loc="upper left", labelcolor=INK, reverse=True)


def _draw_days(ax: Axes, name: str, tests: Sequence[DailyTest]) -> Any:
    from matplotlib.dates import date2num

    days = np.arange(tests[0].day, tests[-1].day + 1)
    names = list(tests[0].p_values)
    cells = np.full((len(names), len(days)), np.nan)
    for seen in tests:
        cells[:, seen.day - days[0]] = [-np.log10(max(seen.p_values[quantity], 1e-12)) for quantity in names]
    left = date2num(date.fromordinal(int(days[0]))) - 0.5
    drawn = ax.imshow(
        cells, aspect="auto", cmap="Blues", vmin=0.0, vmax=4.0, interpolation="nearest",
        extent=(left, left + len(days), len(names) - 0.5, -0.5),
    )  # fmt: skip
    ax.set_yticks(range(len(names)), [title(quantity) for quantity in names], fontsize=TEXT_PT - 3)
    ax.set_title(name.replace("$", r"\$"), loc="left", fontsize=TEXT_PT)
    ax.grid(visible=False)
    return drawn


def _format_days(ax: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    if ax.dataLim.width < MIN_AXIS_DAYS:
        middle = (ax.dataLim.x0 + ax.dataLim.x1) / 2
        ax.set_xlim(middle - MIN_AXIS_DAYS / 2, middle + MIN_AXIS_DAYS / 2)
    locator = AutoDateLocator(maxticks=8)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    ax.xaxis_date()
