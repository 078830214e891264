"""The page in a real browser: it draws what the interface says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pneumofed.server.dashboard.app import create_dashboard
from tests.server.coordinator_folder import METRICS
from tests.server.dashboard.test_page import Stage
from tests.serving import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OFFLINE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=6000"]


@contextmanager
def served(stage: Stage, token: str | None) -> Iterator[str]:
    """The page's address on a free port, for a browser that has shown `token` already."""
    app = create_dashboard(stage.page)

    async def signed(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and token:
            scope = {**scope, "headers": [*scope["headers"], (b"authorization", f"Bearer {token}".encode())]}
        await app(scope, receive, send)

    with serving(signed, log_level="warning", lifespan="off") as address:
        yield address


def dom(address: str, profile: Path) -> str:
    command = [str(CHROMIUM), *OFFLINE, f"--user-data-dir={profile}", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_shows_a_failed_run_and_never_runs_what_a_name_says(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    hostile = "<img src=x onerror=alert(1)>"
    stage.server_app.finish_round(1)
    stage.server_app.begin_round(2, ("north", hostile))
    stage.server_app.end("failed", error=f"round 2: {hostile} was lost", validation=METRICS)
    stage.runs.reconcile()
    with served(stage, stage.token) as address:
        text = dom(address, tmp_path / "profile")
    assert '<h1 id="title">pneumonia-1</h1>' in text
    assert "round 2: &lt;img src=x" in text
    assert "<img src=x" not in text
    assert "no differential privacy in this run" in text
    assert 'aria-label="AUROC by round. Latest: validation 0.900 in round 1' in text
    assert "the coordinator does not answer" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_every_set_that_was_judged_has_its_tile_curve_and_column_and_no_other(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.server_app.finish_round(1, held_out={"adults": {**METRICS, "auroc": 0.777}})
    interval = {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}}
    stage.server_app.end("succeeded", validation=METRICS, test=interval, held_out={"adults": interval})
    stage.runs.reconcile()
    with served(stage, stage.token) as address:
        text = dom(address, tmp_path / "profile")
    tiles = re.findall(r'<div class="set-tile"><dt>([^<]*)</dt><dd>([^<]*)</dd><dd class="under">([^<]*)</dd></div>', text)
    assert tiles == [(f"{name} AUROC", "0.800", "interval 0.700 to 0.900") for name in ("Test", "Adults")]
    head, body = (
        re.search(pattern, text, re.DOTALL) for pattern in (r'id="course-head">(.*?)</thead>', r'id="course">(.*?)</tbody>')
    )
    assert head is not None and body is not None
    sets = ["validation", "test", "adults"]
    columns = re.findall(r'<th scope="col">([^<]*)</th>', head[1].replace(' colspan="1"', ""))
    assert columns == ["Round", "asked", "good", *sets, "training", *sets, "MB", "s"]
    cells = re.findall(r"<td>([^<]*)</td>", body[1])
    assert len(cells) + 1 == len(columns) and cells[2:5] == ["0.900", "0.900", "0.777"]
    assert "adults 0.777 in round 1" in text
    chart = re.search(r'id="loss" class="chart">(.*?)</svg>', text, re.DOTALL)
    assert chart is not None
    looks = re.findall(r'<path d="M[^"]*h26" class="line ([^"]*)"', chart[1])
    assert len(looks) == len(set(looks)) == 4, "each line of the legend has a look of its own"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_without_a_token_the_page_asks_for_one(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with served(stage, None) as address:
        text = dom(address, tmp_path / "profile")
    assert '<main id="login" class="login">' in text
    assert "pneumonia-1" not in text
