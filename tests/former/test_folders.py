"""What an earlier version left on disk opens, and every command says of it what that version said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pneumofed.client.app import app as client_app
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.server.federation.run import run_federation
from pneumofed.server.runs.folder import RunFolder
from pneumofed.simulation.local_grid import LocalGrid
from tests.former.make import ANSWERS, KNOWN, plain
from tests.former.opened import call, read_json


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Fails where the two differ: by more than rounding in numbers, at all in anything else."""
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), where
    else:
        assert found == expected, where


def take_population(told: dict[str, Any]) -> dict[str, Any]:
    """Takes out what `predict` says beyond the former version: of a former bundle it is not known for whom the model was judged."""
    for row in told["images"]:
        assert row.pop("population").get("status", "model_unknown") == "model_unknown"
    counted = told["summary"].pop("populations")
    assert counted["model_unknown"] == sum(counted.values()) > 0
    return told


NEWER_KEYS = (
    *(f"  {key}: " for key in ("erase_borders", "erase_markers", "style")),
    *("  alone: ", "  alone_timeout_sec: ", "  cross_site: "),
    "  hospital_reference: ",
    "  buffer: ",
    "  largest_weight: ",
    "  plateau:",
    *(f"    {key}: " for key in ("monitor", "factor", "patience_rounds", "min_delta")),
    "personal:",
    *(f"  {key}: " for key in ("method", "proximal_lambda", "epochs")),
)
"""Of a run's configuration, which `pneumofed config` prints with all keys; what was there keeps its value."""


@pytest.mark.parametrize("name", ANSWERS)
def test_a_command_says_what_the_former_version_said(shared: Path, name: str) -> None:
    said = plain(call(*ANSWERS[name], ok=range(256)), shared)
    if name == "config":
        said = [line for line in said if not line.startswith(NEWER_KEYS)]
    assert_same(take_population(said) if name == "predict" else said, read_json("answers")[name], name)


@pytest.mark.parametrize(
    "run",
    [
        "finished",
        "coordinator/runs/refused",
        *(pytest.param(run, marks=pytest.mark.slow) for run in ("broken", "coordinator/runs/plain")),
    ],
)
def test_a_report_is_written_of_a_former_run(former: Path, run: str) -> None:
    call("report", former / run)
    assert (former / run / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_former_run_is_exported(former: Path) -> None:
    told = json.loads(
        call("export", former / "finished", "--out", former / "new", "--key", former / "bundle" / "signing", "--json")
    )
    assert told["archive"].endswith(".zip")
    judged = [
        json.loads(call("predict", former / "images" / "test", "--bundle", bundle, "--json"))
        for bundle in ("bundle/model", "new")
    ]
    assert_same([row["classes"] for row in judged[1]["images"]], [row["classes"] for row in judged[0]["images"]])


def test_the_archive_of_a_former_bundle_judges_as_its_folder(former: Path) -> None:
    archive = shutil.make_archive(str(former / "model"), "zip", former / "bundle", "model")
    told = call("predict", former / "images" / "test", "--bundle", archive, "--threads", "1", "--json")
    assert_same(take_population(plain(told, former))["images"], read_json("answers")["predict"]["images"])


def test_a_former_bundle_explains(former: Path) -> None:
    path = former / "images" / "test" / "NORMAL" / "IM-0001-0001.jpeg"
    told = json.loads(call("explain", path, *KNOWN, "--out", former / "maps", "--no-check", "--json"))
    (image,) = told["images"]
    assert image["population"]["sentence"] == "not known for whom the model was judged"
    assert list((former / "maps").glob("*.png"))


def test_a_former_monitor_takes_more_images_and_writes_its_page(former: Path) -> None:
    images = [former / "images" / "external"]
    added = json.loads(call("monitor", "add", *images, *KNOWN, "-C", "monitor", "--day", "2026-11-21", "--json"))
    assert added["judged"] > 0
    call("monitor", "page", *KNOWN, "-C", "monitor")
    assert (former / "monitor" / "drift.html").exists()


def test_preflight_finds_a_former_site_in_order_but_for_the_connection(former: Path) -> None:
    found = json.loads(call("site", "preflight", "-C", "north", "--json", ok=(0, 12)))
    kinds = {finding["kind"] for finding in found}
    assert {"environment", "keys", "data", "policy"} <= kinds
    wrong = [finding for finding in found if finding["level"] == "problem"]
    assert {finding["kind"] for finding in wrong} <= {"connection"}, wrong


def test_who_withdrew_from_a_former_site_is_not_added_again(former: Path) -> None:
    before = (former / "north" / "data" / "manifest.csv").read_text()
    source = ("dicom", former / "dicom" / "dicom" / "train", "--labels", former / "dicom" / "labels.csv")
    call("site", "data", "add", *source, "-C", "north", "--json", ok=range(256))
    assert (former / "north" / "data" / "manifest.csv").read_text() == before


def test_a_former_site_trains_on_and_its_books_go_on(former: Path) -> None:
    """A private run more: the ledger counts it on the same data, the audit log goes on, and nobody changes sides."""
    before, split = (
        json.loads(call("privacy", "show", "-C", "north", "--json")),
        (former / "north" / "work" / "split.json").read_text(),
    )
    experiment = RunFolder(former / "coordinator" / "runs" / "private").read_config()
    experiment = experiment.model_copy(
        update={"name": "again", "strategy": experiment.strategy.model_copy(update={"wait_for_sites": 1})}
    )
    nodes = [{"site-config": str(former / "north" / "site.yaml")}]
    settings = CoordinatorConfig(
        run_dir=str(former / "again"), test_manifest=str(former / "coordinator" / "test.csv"), device="cpu"
    )
    assert run_federation(LocalGrid(client_app, nodes, {}), experiment, settings).status == "succeeded"
    after = json.loads(call("privacy", "show", "-C", "north", "--json"))
    assert len(after) == len(before) == 1
    known = len(before[0]["runs"])
    assert after[0]["runs"][:known] == before[0]["runs"]
    added = after[0]["runs"][known:]  # the counts anew, since a patient withdrew, and the two rounds
    assert {run["study"] for run in added} == {"again"} and sum(run["entries"] for run in added) == 3
    assert after[0]["epsilon"] > before[0]["epsilon"]
    assert (former / "north" / "work" / "split.json").read_text() == split
    call("privacy", "verify", "-C", "north")
    call("audit", "verify", "north/work/audit.jsonl")
    status = json.loads(call("site", "status", "-C", "north", "--json", ok=(3,)))
    assert not status["audit_problem"] and status["audit_lines"] > 25
