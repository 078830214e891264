"""Hospitals and held-out sets from any source: who is where, and that nobody who is held out trains."""

from __future__ import annotations

import csv
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, format_yaml, read_yaml
from pneumofed.common.errors import ConfigError, DataError, SkipReason
from pneumofed.server.report.course import reproducing_command
from pneumofed.server.report.read_run import read_run
from pneumofed.simulation.hospitals.federation import lay_out
from pneumofed.simulation.hospitals.sources import SimulationConfig, check_places, read_source
from pneumofed.simulation.hospitals.study import VirtualStudy, count_hospitals, gather, keep_apart
from pneumofed.simulation.phantoms.phantom import write_phantoms
from pneumofed.simulation.plan import SimulationRequest
from tests.tiny import tiny_experiment


def image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32), dtype=np.uint8)).save(path)
    return path


def table(folder: Path, patients: Sequence[str], *, first: int = 0, **columns: Sequence[str]) -> Path:
    """A table with an image a patient, normal and pneumonia in turn."""
    rows: list[Mapping[str, str]] = []
    for number, patient in enumerate(patients):
        path = image(folder / f"{first + number}.png", first + number)
        more = {name: values[number] for name, values in columns.items()}
        rows.append({"path": path.name, "patient": patient, "label": ("normal", "pneumonia")[number % 2], **more})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


def kaggle(folder: Path, patients: int, first: int = 0) -> Path:
    for split, count in (("train", patients), ("test", 4)):
        for number in range(count):
            seed = 10_000 * (split == "test") + first + number
            image(folder / split / "NORMAL" / f"IM-{number:04d}-0001.jpeg", seed)
            image(folder / split / "PNEUMONIA" / f"person{number}_bacteria_1.jpeg", seed + 5_000)
    return folder


def people(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def study_of(cfg: SimulationConfig, seed: int = 0) -> VirtualStudy:
    return gather(cfg, Path(cfg.data) if cfg.data else None, None, seed)


def sizes(study: VirtualStudy) -> dict[str, int]:
    return {hospital.name: len(hospital.manifest) for hospital in study.hospitals}


def test_a_divided_set_and_given_hospitals_make_one_study(tmp_path: Path) -> None:
    children, adults = kaggle(tmp_path / "children", 12), table(tmp_path / "adults", people("a", 10))
    cfg = SimulationConfig(data=str(children), hospitals=3, partition="iid", sources={"adults:2": str(adults)})
    study = study_of(cfg)
    assert sorted(sizes(study)) == ["adults-00", "adults-01", "hospital-00", "hospital-01", "hospital-02"]
    assert count_hospitals(cfg) == len(study.hospitals) == 5
    assert sum(sizes(study).values()) == study.report.used == 34
    assert list(study.held_out) == ["test"] and len(study.held_out["test"].manifest) == 8
    counts = [len(hospital.manifest) for hospital in study.hospitals]
    assert counts == sorted(counts, reverse=True)


def test_a_study_does_not_depend_on_the_order_of_its_sources(tmp_path: Path) -> None:
    places = {name: str(table(tmp_path / name, people(name, 8), first=100 * number)) for number, name in enumerate("abc")}
    first = SimulationConfig(sources={f"{name}:2": place for name, place in places.items()})
    second = SimulationConfig(sources={f"{name}:2": places[name] for name in "cab"})

    def patients(cfg: SimulationConfig) -> dict[str, tuple[str, ...]]:
        return {hospital.name: hospital.manifest.patients for hospital in study_of(cfg).hospitals}

    assert patients(first) == patients(second)


def test_a_column_names_the_hospital_of_each_image(tmp_path: Path) -> None:
    places = ["St. Mary", "St. Mary", "north/2", "north/2", "St. Mary", "east"]
    data = table(tmp_path / "set", people("p", 6), hospital=places)
    cfg = SimulationConfig(data=str(data), partition="column:Hospital")
    assert sizes(study_of(cfg)) == {"St.-Mary": 3, "north-2": 2, "east": 1}
    assert count_hospitals(cfg) == 3


def test_a_hospital_none_of_whose_images_can_be_used_does_not_count(tmp_path: Path) -> None:
    data = table(tmp_path / "set", people("p", 4), hospital=["a", "a", "a", "b"])
    data.write_text(data.read_text().replace("p3,pneumonia", "p3,"))
    cfg = SimulationConfig(data=str(data), partition="column:hospital")
    assert count_hospitals(cfg) == len(study_of(cfg).hospitals) == 1


def test_two_values_of_a_column_never_become_one_hospital(tmp_path: Path) -> None:
    data = table(tmp_path / "set", people("p", 2), hospital=["St Mary", "St-Mary"])
    with pytest.raises(ConfigError, match="two values of column 'hospital' give one name, St-Mary"):
        study_of(SimulationConfig(data=str(data), partition="column:hospital"))


@pytest.mark.parametrize(("column", "told"), [("ward", "has no column 'ward'"), ("hospital", "is empty for 1 image;")])
def test_a_column_that_does_not_name_every_hospital_is_refused(tmp_path: Path, column: str, told: str) -> None:
    data = table(tmp_path / "set", people("p", 3), hospital=["a", "", "b"])
    with pytest.raises(ConfigError, match=told):
        study_of(SimulationConfig(data=str(data), partition=f"column:{column}"))


def test_a_share_of_the_patients_is_held_out_and_does_not_train(tmp_path: Path) -> None:
    adults = table(tmp_path / "adults", [name for name in people("a", 20) for _ in range(2)])
    study = study_of(SimulationConfig(sources={"adults:2": str(adults)}, hold_out={"adults": 0.3}))
    held = set(study.held_out["adults"].manifest.patients)
    trained = {patient for hospital in study.hospitals for patient in hospital.manifest.patients}
    assert not held & trained and held | trained == set(people("a", 20))
    assert 4 <= len(held) <= 8


def test_later_images_must_be_like_those_of_any_source_that_trains_and_not_like_other_sets(tmp_path: Path) -> None:
    children, adults = kaggle(tmp_path / "children", 12), table(tmp_path / "adults", people("a", 20))
    cfg = SimulationConfig(
        data=str(children), hospitals=2, partition="iid", sources={"adults:2": str(adults)}, hold_out={"adults": 0.3},
        held_out={"elsewhere": str(table(tmp_path / "elsewhere", people("e", 4), first=700))},
    )  # fmt: skip
    federation = lay_out(cfg, tiny_experiment(), tmp_path / "run", resume=False)
    written = build_config(CoordinatorConfig, read_yaml(federation.coordinator_file), "coordinator.yaml")
    assert written.reference_sets == ["test", "adults"] and set(written.held_out) == {"elsewhere", "adults"}


def test_held_out_patients_and_images_are_taken_out_of_training(tmp_path: Path) -> None:
    train = table(tmp_path / "set", people("p", 10))
    shutil.copy(train, tmp_path / "set" / "test.csv")
    held = (tmp_path / "set" / "test.csv").read_text().splitlines()
    (tmp_path / "set" / "test.csv").write_text("\n".join(held[:4]) + "\n")  # patients p0 to p2 of the same place
    other = table(tmp_path / "other", ["p5", "q"], first=500)
    shutil.copy(tmp_path / "set" / "7.png", tmp_path / "other" / "501.png")  # the image of p7 under another name
    cfg = SimulationConfig(
        sources={"north": str(train)}, held_out={"same": str(tmp_path / "set" / "test.csv"), "other": str(other)}
    )
    before = study_of(cfg)
    study = keep_apart(before, {name: tmp_path / "cache" / name for name in ("north", "same", "other")})
    assert study.hospitals[0].manifest.patients == ("p3", "p4", "p5", "p6", "p8", "p9")  # p5 of another place is another patient
    assert study.report.skipped[SkipReason.HELD_OUT] == 4
    assert study.report.used == before.report.used - 4 and study.report.patients == 6


def as_series(folder: Path, renamed: str = "") -> Path:
    """Puts each image of a table into a folder of its own, as a CT series is one."""
    for file in sorted(folder.glob("*.png")):
        (folder / file.stem).mkdir()
        file.rename(folder / file.stem / f"{renamed}{file.name}")
    listed = folder / "labels.csv"
    listed.write_text(listed.read_text().replace(".png", ""))
    return listed


def test_a_held_out_series_does_not_train_under_another_name(tmp_path: Path) -> None:
    train, held = table(tmp_path / "set", people("p", 6)), table(tmp_path / "held", ["q", "r"], first=500)
    shutil.copy(tmp_path / "set" / "3.png", tmp_path / "held" / "501.png")
    as_series(tmp_path / "set"), as_series(tmp_path / "held", "other-")
    study = study_of(SimulationConfig(sources={"north": str(train)}, held_out={"held": str(held)}))
    study = keep_apart(study, {name: tmp_path / "cache" / name for name in ("north", "held")})
    assert study.hospitals[0].manifest.patients == ("p0", "p1", "p2", "p4", "p5")


def test_a_hospital_of_held_out_patients_alone_is_refused(tmp_path: Path) -> None:
    place = str(table(tmp_path / "set", people("p", 4)))
    study = study_of(SimulationConfig(sources={"north": place}, held_out={"same": place}))
    with pytest.raises(ConfigError, match="north: all its images"):
        keep_apart(study, {name: tmp_path / "cache" / name for name in ("north", "same")})


def test_phantoms_are_never_mixed_with_other_images(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 6, 0, 64)
    real = table(tmp_path / "real", people("p", 4))
    with pytest.raises(ConfigError, match="never mixed"):
        study_of(SimulationConfig(data=str(tmp_path / "phantoms"), hospitals=2, sources={"real": str(real)}))


def test_public_sets_are_known_by_their_tables(tmp_path: Path) -> None:
    nih = tmp_path / "nih"
    image(nih / "images_001" / "00000001_000.png", 1)
    (nih / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position\n00000001_000.png,No Finding,1,58,M,PA\n"
    )
    source = read_source(nih)
    assert source.namespace == "nih" and source.manifest.labels == ("normal",)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"data": "{place}/nowhere"}, "data: .*nowhere does not exist"),
        ({"sources": {"north": "{place}/nowhere"}}, "north: .*does not exist"),
        ({"sources": {"north": "{place}/set"}, "hold_out": {"south": 0.2}}, "south is no source"),
        ({"sources": {"a": "{place}/set"}, "held_out": {"a": "{place}/set"}, "hold_out": {"a": 0.2}}, "already a held-out set"),
        ({"data": "{place}/empty"}, "no known layout"),
        ({"hold_out": {"test": 0.2}}, "has a test/ of its own"),
        ({"data": "{place}/set", "partition": "scanner", "sources": {"a": "{place}/set"}}, "goes with no given hospitals"),
    ],
)
def test_what_cannot_be_a_source_is_told_before_an_image_is_read(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    table(tmp_path / "set", people("p", 2))
    (tmp_path / "empty").mkdir()

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(one) for key, one in value.items()}
        return value.format(place=tmp_path) if isinstance(value, str) else value

    with pytest.raises((ConfigError, DataError), match=told):
        check_places(SimulationConfig(**placed(values)))


def test_a_share_from_the_command_line_is_a_number() -> None:
    assert build_config(SimulationConfig, {"hold_out": {"adults": "0.3"}}).hold_out == {"adults": 0.3}
    for share in ("a third", "1.5", "nan"):
        with pytest.raises(ConfigError, match=r"hold_out\.adults"):
            build_config(SimulationConfig, {"hold_out": {"adults": share}})


@pytest.mark.parametrize("name", ["test", "pooled", "Adults", "a/b", ""])
def test_a_held_out_set_needs_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="held_out"):
        SimulationConfig(held_out={name: "somewhere"})


@pytest.mark.parametrize(
    "values",
    [
        {"data": "set", "external": "far", "hospitals": 3, "partition": "dirichlet", "alpha": 2.0, "threads": 2},
        {"data": "set", "sources": {"adults:2": "a b", "north": "n"}, "hold_out": {"adults": 0.3}, "held_out": {"many": "m"}},
        {"sources": {"north": "n", "south": "s"}, "slow": {"south": 10.0}},
        {"data": "set", "partition": "column:ward"},
        {"hospitals": 4, "phantom_patients": 40},
    ],
)
def test_the_reports_command_lays_out_the_same_hospitals(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimulationConfig.model_validate(values)
    (tmp_path / "simulation.yaml").write_text(format_yaml(settings.model_dump()))
    (tmp_path / "config.yaml").write_text(format_yaml(tiny_experiment().model_dump()))
    command = shlex.split(reproducing_command(read_run(tmp_path)))
    asked: list[SimulationRequest] = []
    monkeypatch.setattr("pneumofed.cli.main._simulate", lambda request, *_: asked.append(request))
    found = CliRunner().invoke(app, command[1:])
    assert found.exit_code == 0, found.output
    assert build_config(SimulationConfig, asked[0].simulation_values()) == settings
