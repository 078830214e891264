"""`pneumofed predict` as a script sees it."""

from __future__ import annotations

import csv
import json
import logging
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.imaging.patient_groups import AgeGroup, PatientGroups
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.suitability import Decision, Judgement, Prediction
from pneumofed.common.wire.keys import NodeKey
from pneumofed.inference.cli.predict import predict_command
from pneumofed.inference.monitor.monitor import Monitor
from pneumofed.inference.monitor.reference import encode_groups
from pneumofed.inference.monitor.store import STORE_FILE, MonitorStore
from pneumofed.inference.predict import outputs
from pneumofed.inference.predict.dicom_contents import words
from pneumofed.inference.predict.dicom_objects import make_report, read_source_header
from pneumofed.inference.predict.predict import CSV_COLUMNS, FileResult, Loaded, PredictionSummary, find_files, judge_files
from pneumofed.server.runs.folder import RunFolder
from tests.inference.predict.pictures import STUDY, write_phantom, write_png
from tests.model_bundles import judged_on, make_bundle

app = typer.Typer()
app.command()(predict_command)


def run(bundle: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--bundle", str(bundle)])


def run_json(bundle: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    result = run(bundle, *arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of a study, a lateral view of it, a picture, and a file that is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_phantom(folder / "DOE_JANE_1.dcm", 0)
    write_phantom(folder / "DOE_JANE_2.dcm", 1)
    write_phantom(folder / "DOE_JANE_3.dcm", 2, ViewPosition="LL")
    write_png(folder / "[red]x.png", 3)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_json_tells_all_of_every_file(bundle_dir: Path, folder: Path) -> None:
    code, told = run_json(bundle_dir, folder)
    assert code == 3
    by_name = {Path(row["file"]).name: row for row in told["images"]}
    assert [by_name[name]["status"] for name in sorted(by_name)] == [*("judged",) * 2, "cannot_judge", "judged", "unreadable"]
    judged, lateral, text = (by_name[name] for name in ("DOE_JANE_1.dcm", "DOE_JANE_3.dcm", "notes.txt"))
    assert 0 <= judged["low"] <= judged["probability"] <= judged["high"] <= 1
    assert (judged["finding"] == "pneumonia") == (judged["probability"] >= judged["threshold"])
    assert judged["classes"]["pneumonia"] == pytest.approx(judged["probability"])
    assert "not_frontal" in lateral["reasons"]
    assert lateral["probability"] is None
    assert lateral["classes"] == {}
    assert (text["reasons"], text["explanation"]) == (["unknown_format"], "not a DICOM, JPEG, PNG, TIFF, BMP or WebP file")
    assert told["summary"]["files"] == 5
    assert told["model"]["digest"]
    assert told["schema"] == 1


def test_a_study_has_the_finding_of_its_most_suspicious_image(bundle_dir: Path, folder: Path) -> None:
    told = run_json(bundle_dir, folder)[1]
    (study,) = told["studies"]
    of_study = [row for row in told["images"] if row["study"] == STUDY]
    worst = max((row for row in of_study if row["probability"] is not None), key=lambda row: row["probability"])
    assert (study["images"], study["judged"]) == (3, 2)
    assert (study["probability"], study["finding"], study["instance"]) == (
        worst["probability"],
        worst["finding"],
        worst["instance"],
    )


def test_csv_has_the_same_rows_in_a_file_of_its_own(bundle_dir: Path, folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    told = run_json(bundle_dir, folder, "--csv", table)[1]
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*CSV_COLUMNS, "probability_normal", "probability_pneumonia", "model"]
    assert [row["file"] for row in rows] == [row["file"] for row in told["images"]]
    for row, image in zip(rows, told["images"], strict=True):
        assert row["probability"] == ("" if image["probability"] is None else f"{image['probability']:.6f}")
        assert row["reasons"].split() == image["reasons"]
        assert row["model"] == told["model"]["digest"]
    assert table.stat().st_mode & 0o777 == 0o600


def test_no_cell_of_the_csv_starts_a_formula(bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "=HYPERLINK(x).png")
    run(bundle_dir, "=HYPERLINK(x).png", "--csv", "out.csv")
    cells = [cell for row in csv.reader((tmp_path / "out.csv").read_text().splitlines()) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")]


def test_the_table_shows_names_as_they_are(bundle_dir: Path, folder: Path) -> None:
    result = run(bundle_dir, folder)
    assert result.exit_code == 3
    assert "[red]x" in result.stdout
    assert "PHANTOMS" in result.stdout
    assert "5 files" in result.stdout


def test_long_names_can_be_told_apart_in_a_narrow_terminal(bundle_dir: Path, tmp_path: Path) -> None:
    names = [f"{folder}/1.2.840.113619.2.55.3.2831868886.{number}.png" for folder in ("a", "b") for number in (41, 42)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(tmp_path / name, number)
    predictor = Predictor(load_bundle(bundle_dir, None), threads=1)
    buffer, summary = StringIO(), PredictionSummary()
    with outputs.open_table(Console(file=buffer, width=60), predictor, summary) as table:
        for result in judge_files(find_files([tmp_path]), predictor):
            table.add(result)
    cells = [line.split("│")[1].strip() for line in buffer.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells) == "".join(names), "every character of every name, from the first folder that differs"


@pytest.mark.parametrize(
    ("probability", "threshold", "sentence"),
    [
        (0.669, 0.696, "below the threshold of 69.6 %"),
        (0.69599, 0.69601, "below the threshold of 69.601 %"),
        (0.31, 0.25, "at or above the threshold of 25.0 %"),
        (0.9, 0.7, ""),
        (0.2, 0.7, ""),
    ],
)
def test_a_finding_on_the_other_side_of_one_half_says_why(probability: float, threshold: float, sentence: str) -> None:
    decision: Decision = "pneumonia" if probability >= threshold else "normal"
    found = Prediction(decision, probability, 0.1, 0.9, {}, 0.0, None)
    empty = np.empty(0, np.float32)
    judgement = Judgement("x", "m", "d", threshold, True, (), {}, empty, empty, found)
    assert outputs.table_cells(FileResult(Loaded(Path("/x")), judgement))[-1].plain == sentence


def test_a_run_in_the_place_of_a_bundle_is_told_how_to_export(folder: Path, tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path / "run")
    run_folder.last_checkpoint.parent.mkdir(parents=True)
    run_folder.config.touch()
    for given in (run_folder.path, run_folder.last_checkpoint):
        told = str(run(given, folder).exception)
        assert f"`pneumofed export {run_folder.path}`" in told
    (run_folder.path / "bundle").mkdir()
    (run_folder.path / "bundle" / "bundle.json").touch()
    assert str(run(run_folder.path, folder).exception).endswith(f"give {run_folder.path / 'bundle'}")


def test_the_table_is_bounded(bundle_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "TABLE_ROWS", 2)
    assert "and 3 more" in run(bundle_dir, folder).stdout


def test_exit_codes(bundle_dir: Path, folder: Path, tmp_path: Path) -> None:
    assert run(bundle_dir, folder / "DOE_JANE_1.dcm", folder / "DOE_JANE_3.dcm").exit_code == 0
    assert run(bundle_dir, folder / "notes.txt").exit_code == 1
    assert run(bundle_dir, tmp_path / "missing.png", folder / "DOE_JANE_1.dcm").exit_code == 3
    (tmp_path / "nothing").mkdir()
    assert isinstance(run(bundle_dir, tmp_path / "nothing").exception, ConfigError)
    assert isinstance(run(tmp_path / "nothing", folder).exception, BundleError)


def test_a_bundle_of_a_stranger_is_refused(bundle_dir: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stranger.pub").write_bytes(NodeKey.generate("stranger").public)
    result = run(bundle_dir, folder, "--trusted", tmp_path / "stranger.pub")
    assert isinstance(result.exception, BundleError)


def test_an_output_that_cannot_be_written_is_said_before_the_work(bundle_dir: Path, folder: Path, tmp_path: Path) -> None:
    for option, target in (("--csv", tmp_path / "no" / "out.csv"), ("--sr", folder / "notes.txt")):
        result = run(bundle_dir, folder, option, target)
        assert isinstance(result.exception, ConfigError), option


def test_int8_answers_too(bundle_dir: Path, folder: Path) -> None:
    image = folder / "DOE_JANE_1.dcm"
    full, small = (run_json(bundle_dir, image, *more)[1]["images"][0]["probability"] for more in ((), ("--int8",)))
    assert small == pytest.approx(full, abs=0.15)


def test_nothing_of_a_patient_is_logged(bundle_dir: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        result = run(bundle_dir, folder, "--json", "--sr", tmp_path / "sr", "--overlay", tmp_path / "overlay")
    for secret in ("DOE_JANE", "Doe^Jane", "MRN-1001", "ACC-9"):
        assert secret not in caplog.text
        assert secret not in result.stderr
        assert not [path for path in (tmp_path / "sr").iterdir() if secret in path.name]


def monitored(bundle_dir: Path, folder: Path) -> Monitor:
    return Monitor.open(folder, load_bundle(bundle_dir, None))


def test_what_is_judged_is_in_the_monitor_by_patient(bundle_dir: Path, folder: Path, tmp_path: Path) -> None:
    told = run_json(bundle_dir, folder, "--monitor", tmp_path / "monitor")[1]
    found = monitored(bundle_dir, tmp_path / "monitor").check().found
    judged = [row for row in told["images"] if row["status"] != "unreadable"]
    assert found.refused.tolist() == [row["status"] == "cannot_judge" for row in judged]
    assert len(set(found.units[[Path(row["file"]).name.startswith("DOE") for row in judged]])) == 1


def test_a_monitor_that_cannot_be_written_is_told_of_once_and_judging_goes_on(
    bundle_dir: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "monitor" / STORE_FILE).mkdir(parents=True)  # a folder in the database's place
    result = run(bundle_dir, folder, "--json", "--monitor", tmp_path / "monitor")
    assert json.loads(result.stdout)["summary"]["judged"] == 3
    assert result.stderr.count("--monitor: stopped after 0 images") == 1


def test_a_file_in_the_place_of_the_monitor_is_told_before_anything_is_judged(
    bundle_dir: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "monitor").write_text("a file in the folder's place")
    result = run(bundle_dir, folder, "--json", "--monitor", tmp_path / "monitor")
    assert isinstance(result.exception, ConfigError) and "monitor cannot be written" in str(result.exception)


def test_a_user_who_stops_it_is_told_what_there_is(
    bundle_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[FileResult] = []

    def interrupt(self: PredictionSummary, row: FileResult) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(row)
        count(self, row)

    count = PredictionSummary.add
    monkeypatch.setattr(PredictionSummary, "add", interrupt)
    result = run(bundle_dir, folder, "--csv", tmp_path / "out.csv", "--overlay", tmp_path / "maps")
    assert result.exit_code == 130
    assert not (tmp_path / "out.csv").exists()
    told = " ".join(result.stderr.split())
    assert (
        f"stopped after 2 files; {tmp_path / 'out.csv'} was not written; what was written into {tmp_path / 'maps'} stays" in told
    )
    assert "resume" not in told


@pytest.fixture(scope="module")
def adults_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("adults") / "bundle", population=judged_on(age="adult older_adult", view="PA"))


def test_a_child_under_an_adults_model_is_warned_of_in_table_json_and_csv(adults_bundle: Path, tmp_path: Path) -> None:
    child, adult, unknown = (tmp_path / name for name in ("a.dcm", "b.dcm", "c.png"))
    write_phantom(child, 0, PatientBirthDate="20200101", StudyDate="20260101")
    write_phantom(adult, 1, PatientAge="054Y")
    write_png(unknown, 3)
    _, told = run_json(adults_bundle, child, adult, unknown, "--csv", tmp_path / "out.csv")
    found = [row["population"] for row in told["images"]]
    assert [one["status"] for one in found] == ["not_judged", "judged", "age_unknown"]
    assert [one["age_group"] for one in found] == ["child", "adult", None]
    assert told["summary"]["populations"] == {"judged": 1, "not_judged": 1, "age_unknown": 1, "model_unknown": 0}
    assert [row["status"] for row in told["images"]] == ["judged"] * 3, "a warning is no refusal"
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["population"], row["age_group"]) for row in rows] == [
        ("judged", "not_judged", "child"),
        ("judged", "judged", "adult"),
        ("judged", "age_unknown", ""),
    ]
    assert rows[0]["population_note"] == found[0]["sentence"]
    table = " ".join(run(adults_bundle, child, adult, unknown).stdout.split())
    assert "The model was judged on adults, adults of 65 years and over." in table
    assert "1 of the images are of patients that it was not judged for" in table
    assert "Of 1 image the patient's age is not known." in table
    assert not any("20200101" in text for text in (json.dumps(told), table))


def test_the_monitor_is_given_groups_and_no_date(adults_bundle: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "a.dcm", 0, PatientBirthDate="20200101", StudyDate="20260101")
    run(adults_bundle, tmp_path / "a.dcm", "--monitor", tmp_path / "monitor")
    kept = MonitorStore(tmp_path / "monitor")
    (groups,) = kept.read(load_bundle(adults_bundle, None).digest).groups.tolist()
    assert groups == encode_groups([PatientGroups(AgeGroup.CHILD, "F", "PA")])[0].tolist()
    assert b"20200101" not in kept.path.read_bytes()


def test_a_bundle_of_an_earlier_version_says_that_nothing_is_known(bundle_dir: Path, folder: Path) -> None:
    assert "Not known for whom the model was judged." in run(bundle_dir, folder).stdout
    told = run_json(bundle_dir, folder)[1]
    assert {row["population"].get("status") for row in told["images"]} == {"model_unknown", None}


def test_picture_and_report_for_the_archive_warn_too(adults_bundle: Path, tmp_path: Path) -> None:
    predictor = Predictor(load_bundle(adults_bundle, None), threads=1)
    read = predictor.read(write_phantom(tmp_path / "a.dcm", 0, PatientAge="005Y"))
    (judgement,) = predictor.judge([read.image])
    assert judgement.prediction
    lines = words(judgement.prediction, predictor, judgement.population)
    assert "not judged for this population: child of 2 to 11 years" in lines
    report = make_report([read_source_header(tmp_path / "a.dcm")], judgement, predictor)
    texts = [item.TextValue for item in report.ContentSequence if "TextValue" in item]
    assert f"Population: {judgement.population.sentence}." in texts
