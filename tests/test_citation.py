"""CITATION.cff names what is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"cff-version", "message", "title", "authors"}
"""Of the Citation File Format 1.2.0 (Druskat et al. 2021)."""


def test_the_citation_has_the_version_and_licence_of_the_project() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited.keys() >= REQUIRED and cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["authors"] == [{"name": "The pneumofed authors"}]
