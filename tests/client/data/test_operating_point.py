"""A hospital's own operating point: on whom it is chosen, what is said of it, and that everything which decides follows it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from scipy.special import expit, logit
from scipy.stats import norm

import pneumofed
from pneumofed.client.data.bundles import choose_at_site
from pneumofed.client.federation.requests import audit_log
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.errors import ConfigError, DataError, EmptySiteError, ReleaseError
from pneumofed.common.evaluation.metrics import choose_threshold
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.evaluate import choose_point, rates_at
from pneumofed.common.model_bundle.manifest import Provenance
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.release import use_site_point
from pneumofed.common.wire.keys import write_node_key
from pneumofed.inference.reading_room.serve import model_info, open_room_bundle
from pneumofed.inference.reading_room.settings import RoomFolder, RoomSettings
from tests.former.opened import call
from tests.model_bundles import PREPROCESSING, make_bundle, phantom_images, signing_key

ORIGIN_TIME = datetime(2026, 1, 1, tzinfo=UTC)
ORIGIN = Provenance(
    pneumofed="0", run="run-of-the-bundle", round=1, checkpoint="0" * 64, config="0" * 64, split_seed=0, validation_fraction=0.45
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "bundle", provenance=ORIGIN), [signing_key().public_key()])


def make_site(folder: Path, patients: int = 120, *, labels: str = "true") -> Path:
    """A site folder with one phantom a patient."""
    write_node_key(folder / "keys", "north")
    (folder / "images").mkdir()
    records = []
    for number, (image, label) in enumerate(phantom_images(patients, seed=5)):
        path = folder / "images" / f"{number}.png"
        PIL.Image.fromarray((image.pixels * 255).round().astype(np.uint8)).save(path)
        said = label if labels == "true" else number % 2
        records.append(ImageRecord(path, f"patient-{number}", ("normal", "pneumonia")[said]))
    write_manifest(Manifest(tuple(records)), folder / "manifest.csv")
    (folder / "connection.yaml").write_text("coordinator: fl.example.org:9443\n")
    told = {"name": "north", "manifest": str(folder / "manifest.csv"), "work_dir": str(folder / "work"), "device": "cpu"}
    (folder / "site.yaml").write_text(yaml.safe_dump(told))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("s") / "site")


def judge(bundle: Bundle, records: tuple[ImageRecord, ...]) -> list[tuple[float, int, str]]:
    """(calibrated probability, label, decision) of what the bundle judges, as a user would get it."""
    predictor = Predictor(bundle, threads=1)
    found = predictor.judge([predictor.read(record.path).image for record in records])
    return [
        (one.prediction.probability, int(record.label != "normal"), one.prediction.decision)
        for one, record in zip(found, records, strict=True)
        if one.prediction is not None
    ]


def test_it_is_chosen_on_patients_whom_the_model_was_not_trained_on(bundle: Bundle, site: Path) -> None:
    config = read_site_config(site / "site.yaml")
    found = choose_at_site(config, bundle, "sensitivity", 0.9)
    experiment = ExperimentConfig.model_validate(
        {"seed": 0, "image": PREPROCESSING.image.model_dump(), "training": {"validation_fraction": 0.45, "split_seed": 0}}
    )
    kept = load_site(config, experiment).validation.records
    judged = judge(bundle, kept)
    assert (found.images, found.refused) == (len(judged), len(kept) - len(judged))
    assert sum(found.patients) == found.images < 120, "each phantom is a patient"
    called = [label for probability, label, _ in judged if probability >= found.point.value]
    missed = [label for probability, label, _ in judged if probability < found.point.value]
    assert sum(called) / found.patients[0] >= 0.9
    lowest = min(probability for probability, label, _ in judged if label and probability >= found.point.value)
    assert not [one for one, _, _ in judged if found.point.value <= one < lowest], "no image lies between"
    assert sum(missed) <= 0.1 * found.patients[0]


def test_a_site_that_took_no_part_has_all_its_patients_and_is_not_believed_against_its_audit_log(
    bundle: Bundle, tmp_path: Path
) -> None:
    config = read_site_config(make_site(tmp_path / "site", 60) / "site.yaml")
    with pytest.raises(
        EmptySiteError, match=r"north: \d+ patients with pneumonia and \d+ without .* needs 20 of each; .*--took-no-part"
    ):
        choose_at_site(config, bundle)
    found = choose_at_site(config, bundle, took_part=False)
    assert found.images + found.refused == 60
    audit_log(config).record("request", work="train", run=ORIGIN.run, round=1)
    with pytest.raises(ConfigError, match="took part in the run"):
        choose_at_site(config, bundle, took_part=False)


def test_no_threshold_is_given_where_the_model_is_no_better_than_chance(bundle: Bundle, tmp_path: Path) -> None:
    config = read_site_config(make_site(tmp_path / "site", labels="in turn") / "site.yaml")
    with pytest.raises(DataError, match=r"does not tell these patients apart \(AUROC 0\.\d+.*no threshold"):
        choose_at_site(config, bundle, took_part=False)


def test_a_file_that_is_gone_is_one_image_less(bundle: Bundle, tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site", 80)
    config = read_site_config(folder / "site.yaml")
    before = choose_at_site(config, bundle, took_part=False)
    (folder / "images" / "0.png").unlink()
    (folder / "images" / "1.png").write_bytes(b"no image")
    after = choose_at_site(config, bundle, took_part=False)
    assert after.images + after.refused in (80, 78), "decoded before: counted as refused; not in the cache: not used at all"
    assert before.images - 2 <= after.images <= before.images


@pytest.mark.parametrize(("policy", "target"), [("sensitivity", 0.85), ("specificity", 0.95), ("youden", 0.5)])
def test_new_patients_get_what_the_interval_says_although_the_same_patients_chose(
    bundle: Bundle, policy: ThresholdPolicyName, target: float
) -> None:
    """Over 300 hospitals of sixty patients, whose true rates are known."""
    generator, inside = np.random.default_rng(0), []
    for _ in range(300):
        labels = np.repeat([0, 1], 30)
        logits = generator.normal(size=60) + 2.0 * labels - 1.0
        found = Predictions(np.column_stack([expit(-logits), expit(logits)]), labels, tuple(map(str, range(60))))
        chosen = choose_threshold(Statistics.of(found), policy, target).value
        rates = rates_at(found, chosen, policy)
        true = {"sensitivity": norm.sf(logit(chosen), 1.0), "specificity": norm.cdf(logit(chosen), -1.0)}
        inside.append([rates[name].low <= true[name] <= rates[name].high for name in true])
    assert np.mean(inside, axis=0).min() >= 0.93, "0.95 but for three standard errors of 300 draws"


@pytest.mark.parametrize("apart", [1.0, 1.4])
@pytest.mark.parametrize("sick", [20, 200])
def test_the_luckiest_threshold_of_a_poor_model_promises_no_more_than_it_keeps(apart: float, sick: int) -> None:
    """AUROC 0.76 and 0.84, 200 patients without pneumonia."""
    generator, inside = np.random.default_rng(0), []
    labels = np.repeat([0, 1], [200, sick])
    for _ in range(500):
        logits = generator.normal(size=len(labels)) + apart * labels
        found = Predictions(np.column_stack([expit(-logits), expit(logits)]), labels, tuple(map(str, range(len(labels)))))
        chosen = choose_threshold(Statistics.of(found), "youden").value
        rates = rates_at(found, chosen, "youden")
        true = {"sensitivity": norm.sf(logit(chosen), apart), "specificity": norm.cdf(logit(chosen))}
        inside.append([rates[name].low <= true[name] <= rates[name].high for name in true])
    assert np.mean(inside, axis=0).min() >= 0.95


def test_images_of_one_patient_count_as_one(bundle: Bundle) -> None:
    labels, scores = np.repeat([0, 1], 30), np.linspace(0.1, 0.9, 60)
    once = Predictions(np.column_stack([1 - scores, scores]), labels, tuple(map(str, range(60))))
    thrice = Predictions(np.repeat(once.probabilities, 3, axis=0), np.repeat(labels, 3), tuple(np.repeat(once.patients, 3)))
    told = [choose_point(of, bundle, "youden", None, site="s", time=ORIGIN_TIME, refused=0) for of in (once, thrice)]
    assert told[0].at_own == told[1].at_own and told[0].patients == told[1].patients == (30, 30)
    assert told[1].images == 3 * told[0].images


def test_everything_that_decides_follows_it_and_no_probability_moves(bundle: Bundle, site: Path, tmp_path: Path) -> None:
    file = tmp_path / "point.json"
    told = json.loads(
        call(
            "site",
            "operating-point",
            bundle.folder,
            "--site",
            site,
            "--out",
            file,
            "--policy",
            "specificity",
            "--target",
            "0.99",
            "--json",
        )
    )
    value = told["point"]["value"]
    assert value != bundle.manifest.threshold.value and told["point"]["site"] == "north"
    assert "patient-" not in file.read_text() and "images/" not in file.read_text()
    assert '"point-chosen"' in (site / "work" / "audit.jsonl").read_text()
    local = use_site_point(bundle, file)
    assert local.digest == bundle.digest
    records = tuple(ImageRecord(path, "p", "normal") for path in sorted((site / "images").iterdir())[:40])
    plain, own = judge(bundle, records), judge(local, records)
    assert [one[0] for one in plain] == [one[0] for one in own]
    assert [one[2] for one in own] == ["pneumonia" if one[0] >= value else "normal" for one in own]
    assert [one[2] for one in plain] != [one[2] for one in own]
    shown = json.loads(call("predict", site / "images", "--bundle", bundle.folder, "--operating-point", file, "--json"))
    assert (shown["model"]["threshold"], shown["model"]["threshold_of"]) == (value, "north")
    assert {one["threshold"] for one in shown["images"]} == {value}
    opened = pneumofed.open_bundle(bundle.folder, operating_point=file)
    assert opened.predict([records[0].path])[0].threshold == value
    room = RoomSettings(hospital="North", bundle=str(bundle.folder), operating_point=str(file))
    info = model_info(open_room_bundle(RoomFolder(tmp_path), room))
    assert (info.threshold, info.threshold_of) == (value, "north")


def test_of_another_bundle_or_changed_by_hand_it_is_refused(bundle: Bundle, site: Path, tmp_path: Path) -> None:
    file = tmp_path / "point.json"
    call("site", "operating-point", bundle.folder, "--site", site, "--out", file)
    other = load_bundle(make_bundle(tmp_path / "other", name="other"), None)
    with pytest.raises(ReleaseError, match=r"is of another model .* site operating-point"):
        use_site_point(other, file)
    content = json.loads(file.read_text())
    content["content"]["point"]["value"] = 0.01
    file.write_text(json.dumps(content))
    with pytest.raises(ReleaseError, match="changed after it was signed"):
        use_site_point(bundle, file)


def test_a_bundle_that_does_not_say_on_whom_it_was_trained_gets_none(site: Path, tmp_path: Path) -> None:
    silent = load_bundle(make_bundle(tmp_path / "silent"), None)
    with pytest.raises(ConfigError, match="does not say"):
        choose_at_site(read_site_config(site / "site.yaml"), silent)


def test_images_that_the_bundle_cannot_judge_choose_nothing(bundle: Bundle, tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site", 40)
    for path in (folder / "images").iterdir():
        PIL.Image.fromarray(255 - np.asarray(PIL.Image.open(path))).save(path)
    with pytest.raises(EmptySiteError, match=r"north: \d patients with pneumonia and \d without could be judged"):
        choose_at_site(read_site_config(folder / "site.yaml"), bundle, took_part=False)
