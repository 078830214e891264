"""The page in a real browser: it draws what the interface says."""

from __future__ import annotations

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
def test_without_a_token_the_page_asks_for_one(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with served(stage, None) as address:
        text = dom(address, tmp_path / "profile")
    assert '<main id="login" class="login">' in text
    assert "pneumonia-1" not in text
