"""A survey of two hospitals as real processes over TLS, through the code gate: each tells what its policy allows, and both logs say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pneumofed.common.audit.log import read_entries
from pneumofed.common.audit.verify import anchors_in, verify_log
from tests.e2e.real import RealFederation, call, dicom_source, kaggle_source
from tests.tiny import draw_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_hospitals_tell_what_their_policies_allow(tmp_path: Path) -> None:
    drawn = [draw_manifest(tmp_path / f"drawn-{number}", 40, seed=number) for number in range(2)]
    sources = {"north": kaggle_source(drawn[0], tmp_path / "kaggle"), "river": dicom_source(drawn[1], tmp_path / "dicom")}
    federation = RealFederation(tmp_path, sources)
    federation.change_yaml(federation.site("river") / "policy.yaml", survey=["label", "view", "year", "age"])
    asked = [f"--ask={field}" for field in ("label", "view", "year", "age", "images")]
    try:
        federation.start()
        options = ("--set", "strategy.wait_for_sites=2", "--folder", str(federation.coordinator))
        told = json.loads(call("server", "survey", "before", *asked, *options, "--json").stdout)
    finally:
        federation.stop()
    north, river = told["answers"]["north"], told["answers"]["river"]
    assert set(north["tables"]) == {"label"}
    assert set(north["withheld"]) == {"view", "year", "age", "images"}
    assert river["tables"]["view"] == {"PA": 40}
    assert river["tables"]["year"] == {"2025 and later": 40}
    assert (river["missing"], river["withheld"]) == (["age"], ["images"])
    assert "DOE^JANE" not in Path(told["page"]).read_text() + (Path(told["page"]).parent / "survey.json").read_text()
    coordinator = federation.coordinator / "state" / "audit.jsonl"
    for name in sources:
        log = federation.site(name) / "work" / "audit.jsonl"
        known = anchors_in(coordinator, name)
        assert known and verify_log(log, known).intact
        (answer,) = [entry.facts for entry in read_entries(log) if entry.event == "answer"]
        assert answer["tables"] == sorted(told["answers"][name]["tables"])
    shown = call("privacy", "show", "--site", str(federation.site("river"))).stdout
    assert "surveys answered on year: 1 in the last 24 hours" in " ".join(shown.split())
