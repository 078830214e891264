"""`pneumofed monitor` as cron and a reader see it: exit codes, the page, mistyped folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from pneumofed.common.errors import ConfigError, MessageError
from pneumofed.common.imaging.types import Image
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.ops.command_line import ALARM
from pneumofed.inference.cli.monitor import app
from pneumofed.inference.monitor.e_processes import Baseline
from pneumofed.inference.monitor.monitor import Monitor, find_drift
from pneumofed.inference.monitor.page import write_drift_page
from pneumofed.inference.monitor.reference import reference_of
from pneumofed.inference.monitor.share import read_share
from pneumofed.inference.monitor.wording import describe_scanners
from tests.inference.monitor.drawn import draw_arrivals, draw_reference
from tests.model_bundles import open_test_bundle, phantom_images

FIRST = date(2026, 3, 2)
SCANNER = "Maker <b>Model"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_test_bundle(tmp_path_factory.mktemp("bundle"))


def darken(image: Image) -> Image:
    return replace(image, pixels=np.ascontiguousarray(image.pixels**1.6))


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The monitor of a site whose second scanner is darker than the reference; ten images a day."""
    folder = tmp_path_factory.mktemp("site") / "monitor"
    monitor, drawn = Monitor.open(folder, bundle), phantom_images(120, 5)
    images = [image for image, _ in drawn]
    judgements = Predictor(bundle).judge([*images[:60], *map(darken, images[60:])])
    for row, ((image, label), judgement) in enumerate(zip(drawn, judgements, strict=True)):
        day = FIRST + timedelta(days=row % 60 // 10)
        scanner = "Steady" if row < 60 else SCANNER
        number = monitor.record(judgement, replace(image.info, manufacturer=scanner), day, f"patient {row}")
        monitor.record_reading(number, "pneumonia" if label else "normal", day)
    return folder


def test_the_darker_scanner_alarms_and_the_other_does_not(bundle: Bundle, folder: Path) -> None:
    alarms = Monitor.open(folder, bundle).check().alarms
    assert {stream.scanner for stream in alarms} == {SCANNER}
    assert {"mean", "quantile_50"} & {stream.quantity for stream in alarms if stream.direction == "lower"}


def test_check_tells_cron_by_its_exit_code(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "monitor")
    options = ["--bundle", str(bundle.folder), "--folder", str(tmp_path / "monitor")]
    alarmed = CliRunner().invoke(app, ["check", *options, "--json"])
    mended = CliRunner().invoke(app, ["resume", SCANNER, *options, "--after", "2026-03-08"])
    quiet = CliRunner().invoke(app, ["check", *options])
    assert (alarmed.exit_code, mended.exit_code, quiet.exit_code) == (ALARM, 0, 0)
    told = json.loads(alarmed.stdout)
    assert told["alarm"] is True
    assert told["scanners"][0]["name"] == SCANNER
    assert told["last_day"] == "2026-03-07"


def test_a_mistyped_folder_does_not_pass_for_quiet(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Check --folder"):
        Monitor.open(tmp_path / "nothing", bundle).check()


@pytest.mark.usefixtures("drawn")
def test_the_page_needs_nothing_else_and_trusts_no_name(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["page", "--bundle", str(bundle.folder), "-C", str(folder), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "drift.html").read_text()
    assert "darker" in page
    assert SCANNER not in page
    assert "Maker &lt;b&gt;Model" in page
    assert not [word for word in ("http://", "https://", "<script", 'src="/', "url(") if word in page]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_an_accepted_scanner_is_quiet_again(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    monitor = Monitor.open(Path(shutil.copytree(folder, tmp_path / "monitor")), bundle)
    with pytest.raises(ConfigError, match="scanners here"):
        monitor.accept("nobody", FIRST, FIRST)
    with pytest.raises(ConfigError, match="take more days"):
        monitor.accept(SCANNER, FIRST, FIRST)
    assert monitor.accept(SCANNER, FIRST, FIRST + timedelta(days=5)) >= 50
    assert not monitor.check().alarms
    assert Monitor.open(folder, bundle).check().alarms


def test_a_mended_scanner_begins_anew_against_the_reference() -> None:
    reference = draw_reference()
    found = draw_arrivals(reference, 200, brighter=3.0)
    assert find_drift(found, reference).alarms
    fixed = replace(found, statistics=np.where(np.arange(200)[:, None] < 100, found.statistics, found.statistics - [3.0, 0.0]))
    findings = find_drift(fixed, reference, [Baseline("A", 100, 100)])
    assert not findings.alarms
    assert {stream.test.own_baseline for stream in findings.current} == {False}


def test_refused_images_of_a_baseline_do_not_count_for_what_is_usual() -> None:
    reference, found = draw_reference(), draw_arrivals(draw_reference(), 200)
    assert found.refused[:100].any()
    findings = find_drift(found, reference, [Baseline("A", 0, 100)])
    (scanner,) = describe_scanners(findings, reference)
    assert scanner.own_baseline
    (row,) = [row for row in scanner.rows if row.quantity == "probability"]
    assert row.usual == pytest.approx(np.median(found.probabilities[:100][~found.refused[:100]]))


def test_the_page_of_a_site_without_images_says_so(tmp_path: Path) -> None:
    reference = draw_reference()
    page, picture = write_drift_page(
        tmp_path, find_drift(draw_arrivals(reference, 20).take(np.empty(0, np.int64)), reference), reference
    )
    assert "nothing to compare" in page.read_text()
    assert picture is None


def test_files_are_judged_and_bad_ones_counted(bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number, (image, _) in enumerate(phantom_images(8, 6)):
        PIL.Image.fromarray(np.rint(image.pixels * 255).astype(np.uint8)).save(source / f"DOE^JANE {number}.png")
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    options = ["--bundle", str(bundle.folder), "-C", str(tmp_path / "monitor"), "--day", "2026-03-02", "--json"]
    result = CliRunner().invoke(app, ["add", str(source), *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["judged"], sum(told["skipped"].values()), told["patients_unknown"]) == (8, 1, 8)
    assert b"DOE" not in (tmp_path / "monitor" / "judged.sqlite").read_bytes()


def test_a_manifest_tells_whose_the_images_are(bundle: Bundle, tmp_path: Path) -> None:
    rows = ["path,patient,label"]
    for number, (image, _) in enumerate(phantom_images(4, 6)):
        path = tmp_path / f"{number}.png"
        PIL.Image.fromarray(np.rint(image.pixels * 255).astype(np.uint8)).save(path)
        rows.append(f"{path},DOE^JANE {number // 2},normal")
    (tmp_path / "patients.csv").write_text("\n".join(rows) + "\n")
    options = ["--bundle", str(bundle.folder), "-C", str(tmp_path / "monitor"), "--json"]
    pictures = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    result = CliRunner().invoke(app, ["add", *pictures, *options, "--patients", str(tmp_path / "patients.csv")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["patients_unknown"] == 0
    assert b"DOE" not in (tmp_path / "monitor" / "judged.sqlite").read_bytes()


def test_the_coordinator_sees_which_site_moved(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    bundle_option, period = ["--bundle", str(bundle.folder)], ["--from", "2026-03-02", "--to", "2026-03-07"]
    shared = tmp_path / "moved.json"
    result = CliRunner().invoke(
        app, ["share", "--out", str(shared), "--site", "moved", "-C", str(folder), *bundle_option, *period]
    )
    assert result.exit_code == 0, result.output
    assert not [word for word in ("patient 1", "Steady", "Maker") if word in shared.read_text()]
    compared = CliRunner().invoke(app, ["compare", str(shared), *bundle_option, "--json"])
    assert compared.exit_code == ALARM
    assert json.loads(compared.stdout)[0]["site"] == "moved"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"format": "pneumofed drift summary 1", "site": "a"}', b"[" * 10**5]
)
def test_a_wrong_file_is_refused_by_the_coordinator(bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "share.json"
    path.write_bytes(content)
    with pytest.raises(MessageError):
        read_share(path, reference_of(bundle))
