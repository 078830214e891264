"""What a careless data folder holds: each bad file becomes a line in the data report, and nothing else is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from pneumofed.common.errors import ConfigError, DataError
from pneumofed.server.runs.summary_records import RunSummary
from pneumofed.simulation.plan import Plan, build_plan
from pneumofed.simulation.runner import run_simulation
from pneumofed.simulation.superlink import Resources
from tests.tiny import draw_image, there

SMALL: dict[str, Any] = {
    "rounds": 1,
    "image": {"size_px": 32},
    "model": {"name": "small_cnn"},
    "training": {"precision": "fp32"},
    "evaluation": {"bootstrap_samples": 10},
}


def kaggle_folder(folder: Path, patients: int = 6) -> Path:
    """A Kaggle layout with `patients` patients of each class in train and four in test, one image each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", patients), ("test", 4)):
        for label in ("NORMAL", "PNEUMONIA"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                name = f"IM-{number:04d}-0001.png" if label == "NORMAL" else f"person{number}_bacteria_{number}.png"
                draw_image(folder / split / label / name, label.lower(), generator)
    return folder


def run(out: Path, data: Path, hospitals: int, **changes: Any) -> RunSummary:
    virtual = {"data": str(data), "hospitals": hospitals, "partition": "iid", "device": "cpu"}
    built = build_plan(out, {**SMALL, **changes}, virtual)
    return run_simulation(Plan(*built, run_dir=out, resources=Resources(hospitals), engine="local"), lambda _: None)


def test_bad_files_are_counted_by_reason_and_the_run_succeeds(tmp_path: Path) -> None:
    data = kaggle_folder(tmp_path / "data")
    normal = data / "train" / "NORMAL"
    whole = (normal / "IM-0000-0001.png").read_bytes()
    (normal / "IM-1001-0001.png").write_bytes(whole[: len(whole) // 2])
    (normal / "IM-1002-0001.jpeg").write_bytes(b"")
    (normal / "IM-1003-0001.jpeg").write_text("no image")
    PIL.Image.new("L", (40, 40), 7).save(normal / "IM-1004-0001.png")
    (normal / "IM-1005-0001.jpeg").write_bytes((normal / "IM-0001-0001.png").read_bytes())
    PIL.Image.fromarray(np.random.default_rng(5).integers(0, 255, (40, 40)).astype(np.uint8)).save(
        normal / "IM-1006-0001.jpeg", "PNG"
    )
    summary = run(tmp_path / "run", data, hospitals=1)
    assert summary.status == "succeeded"
    report = summary.sites["hospital-00"]
    assert there(report.used) + sum(there(report.skipped).values()) == report.found == 18
    assert report.used == 13
    assert set(there(report.skipped)) == {
        "image data truncated or corrupt",
        "file is empty",
        "not a DICOM, JPEG, PNG, TIFF, BMP or WebP file",
        "image without any contrast",
        "same image content seen before",
    }
    skipped = (tmp_path / "run" / "sites" / "hospital-00" / "cache" / "skipped.csv").read_text()
    assert "IM-1002" in skipped
    assert "IM-1002" not in (tmp_path / "run" / "summary.json").read_text()


def test_a_hospital_with_one_patient_takes_part(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", kaggle_folder(tmp_path / "data", patients=2), hospitals=4)
    assert summary.status == "succeeded"
    assert {site.patients for site in summary.sites.values()} == {1}
    assert there(summary.threshold).value == 0.5
    assert there(summary.threshold).reason_of_fallback


def test_a_class_without_images_is_told_and_survived(tmp_path: Path) -> None:
    data = kaggle_folder(tmp_path / "data")
    for path in (data / "train" / "NORMAL").iterdir():
        path.unlink()
    summary = run(tmp_path / "run", data, hospitals=2)
    assert summary.status == "succeeded"
    assert all(there(site.classes).get("normal", 0) == 0 for site in summary.sites.values())
    assert there(summary.source).warnings == {"class without any image": 1}
    assert "no normal" in there(there(summary.threshold).reason_of_fallback)


def test_a_folder_without_any_image_says_what_to_do(tmp_path: Path) -> None:
    data = kaggle_folder(tmp_path / "data")
    for path in data.glob("train/*/*"):
        path.unlink()
    with pytest.raises(DataError):
        run(tmp_path / "run", data, hospitals=2)


def test_more_hospitals_than_patients_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"13.*12|12.*13"):
        run(tmp_path / "run", kaggle_folder(tmp_path / "data"), hospitals=13)


def test_three_class_task_counts_labels_that_name_no_cause(tmp_path: Path) -> None:
    data = kaggle_folder(tmp_path / "data")
    draw_image(data / "train" / "PNEUMONIA" / "person77_unknown_1.png", "pneumonia", np.random.default_rng(1))
    summary = run(tmp_path / "run", data, hospitals=1, task="three_class")
    assert summary.sites["hospital-00"].skipped == {"label is none of the task's classes": 1}


OWN = ["normal", "pneumonia", "tuberculosis"]


def own_classes_table(folder: Path, labels: Sequence[str] = OWN, patients: int = 6, seed: int = 0) -> Path:
    """A table with `patients` patients of each label."""
    generator, rows = np.random.default_rng(seed), ["path,patient,label"]
    folder.mkdir()
    for label in labels:
        for number in range(patients):
            draw_image(folder / f"{label}-{number}.png", "normal" if label == "normal" else "pneumonia", generator)
            rows.append(f"{label}-{number}.png,{label}-{number},{label}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def test_own_classes_are_trained_and_judged_also_where_a_hospital_lacks_one(tmp_path: Path) -> None:
    data = own_classes_table(tmp_path / "data")
    other = own_classes_table(tmp_path / "other", ("normal", "viral"))
    far = own_classes_table(tmp_path / "far", patients=2, seed=1)
    virtual = {"sources": {"north": str(data), "south": str(other)}, "held_out": {"far": str(far)}, "device": "cpu"}
    built = build_plan(tmp_path / "run", {**SMALL, "task": OWN}, virtual)
    plan = Plan(*built, run_dir=tmp_path / "run", resources=Resources(2), engine="local")
    summary = run_simulation(plan, lambda _: None)
    assert summary.status == "succeeded"
    assert there(summary.classes) == tuple(OWN)
    assert there(summary.sites["south"].classes) == {"normal": 6, "pneumonia": 6, "tuberculosis": 0}
    judged = summary.results["far"]
    assert {f"{name}_class_2" for name in ("auroc", "sensitivity", "specificity")} <= judged.keys()
    assert {"auroc_macro", "sensitivity_macro"} <= judged.keys()


def test_a_class_that_no_hospital_has_is_refused_by_its_name_before_any_training(tmp_path: Path) -> None:
    data = own_classes_table(tmp_path / "data", ("normal", "pneumonia"))
    with pytest.raises(ConfigError, match="no image of the class 'tuberculosis' at any of the 2 sites that joined"):
        run(tmp_path / "run", data, hospitals=2, task=OWN)
    assert not (tmp_path / "run" / "history.jsonl").exists() or not (tmp_path / "run" / "history.jsonl").read_text()
