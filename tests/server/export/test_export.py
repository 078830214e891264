"""An export gives a bundle that judges as the run's model did, and says so; what is not good is not exported."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.imaging.patient_groups import AgeGroup, PatientGroups
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.calibration import Calibration, pneumonia_score
from pneumofed.common.model_bundle.manifest import QUANTIZED, IntervalEstimate, Quantization
from pneumofed.common.model_bundle.pooled_scores import HospitalReference, count_scores, pack_counts
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.models.build import classifier_of
from pneumofed.common.wire.keys import key_fingerprint
from pneumofed.inference.monitor.reference import reference_of
from pneumofed.inference.web_model import runtime
from pneumofed.inference.web_model.contents import check_contents
from pneumofed.server.export import export as module
from pneumofed.server.export.export import ExportPlan, export_run, find_reference
from pneumofed.server.export.graph_checks import ExportImages, join_sets, load_central, load_folders
from pneumofed.server.export.measures import calibrate, first_of_each, measure_validation
from pneumofed.server.export.source import read_finished_run
from pneumofed.server.federation.central_evaluation import build_central_evaluator
from pneumofed.server.operations.settings import CoordinatorSettings
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.summary_records import RunSummary
from tests.dicom_factory import write_dicom
from tests.model_bundles import phantom_images, signing_key, small_graph
from tests.server.export.finished_run import write_finished_run
from tests.tiny import there


def export_by_hand(network: nn.Module, _: int, __: int, path: Path) -> None:
    """In the place of torch's exporter, which takes many seconds; `test_graph` tests that one."""
    path.write_bytes(small_graph(network))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_finished_run(tmp_path_factory.mktemp("study") / "run")


@pytest.fixture(scope="module")
def bundle(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("out") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "export_onnx", export_by_hand)
        export_run(ExportPlan(run.path, out, signing_key()))
    return load_bundle(out, [signing_key().public_key()])


def test_the_bundle_decides_as_the_run_did(run: RunFolder, bundle: Bundle) -> None:
    predictions = Predictions.read_csv(run.predictions("test"))
    threshold = there(run.read_summary().threshold).value
    scores = pneumonia_score(Predictor(bundle, threads=1).run(_central_squares(run))["logits"])
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), predictions.scores, atol=1e-5)
    calibrated = bundle.manifest.calibration.probability(scores)
    clear = np.abs(predictions.scores - threshold) > 1e-4
    assert np.array_equal((calibrated >= bundle.manifest.threshold.value)[clear], (predictions.scores >= threshold)[clear])


def test_folder_and_archive_are_one_bundle_and_no_picture_of_a_patient_is_in_it(bundle: Bundle) -> None:
    assert load_bundle(bundle.folder.with_name("bundle.zip"), [signing_key().public_key()]).digest == bundle.digest
    for name in bundle.manifest.files:
        content = bundle.read(name)
        assert b"patient-1" not in content and b"central" not in content, name
    assert set(bundle.manifest.files) >= {
        "weights.pt",
        "model.onnx",
        "model_int8.onnx",
        "reference.npz",
        "card.md",
        "metadata.json",
    }


def test_an_export_that_ended_between_its_two_last_steps_is_completed(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    plan = ExportPlan(run.path, tmp_path / "bundle", signing_key())
    shutil.copytree(bundle.folder, plan.out)
    plan.staging.mkdir()
    shutil.copy(bundle.folder.with_name("bundle.zip"), plan.staging)
    with pytest.raises(ConfigError, match=r"bundle\.zip are whole now"):
        export_run(plan)
    assert load_bundle(plan.archive, None).digest == load_bundle(plan.out, None).digest == bundle.digest
    assert not plan.staging.exists()
    with pytest.raises(ConfigError, match="never overwritten"):
        export_run(plan)


def test_the_calibration_is_that_of_the_validation_statistics(run: RunFolder, bundle: Bundle) -> None:
    fit = bundle.manifest.calibration
    kept = run.read_validation(2)
    assert kept is not None and fit.method == "temperature"
    assert (fit.images, fit.positives) == (kept[1].n, kept[1].n_positive)
    assert fit.design_effect == 2.0  # 80 images of 40 patients
    before, after = (
        next(one.metrics["log_loss"].value for one in found if one.name == "validation")
        for found in (bundle.manifest.card.uncalibrated, bundle.manifest.card.measured)
    )
    assert before is not None and after is not None and after <= before + 1e-9


def test_a_fedbn_network_is_not_calibrated_on_what_other_networks_said(run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(run.path, tmp_path / "run")))
    experiment = read_finished_run(run.path).experiment
    folder.write_config(experiment.model_copy(update={"strategy": experiment.strategy.model_copy(update={"name": "fedbn"})}))
    source = read_finished_run(folder.path)
    fit = calibrate(source, "temperature")
    assert (fit.method, fit.slope, fit.intercept) == ("none", 1.0, 0.0)
    assert "FedBN" in fit.fitted_on
    assert not measure_validation(source, fit)


def test_the_card_says_what_was_measured_on_whom(bundle: Bundle) -> None:
    card = bundle.read("card.md").decode()
    names = [one.name for one in bundle.manifest.card.measured]
    assert names == ["validation", "test", "test, sex F", "test, sex M"]
    for words in ("phantoms", "64 training radiographs of 2 hospital(s)", "## Privacy", "a" * 64, "c" * 40, "By group"):
        assert words in card, words
    test = bundle.manifest.card.measured[1].metrics["auroc"]
    assert test.value is not None and test.low is not None and test.low <= test.value
    assert f"{test.value:.3f}" in card


def test_the_bundle_says_for_whom_it_was_judged_and_the_card_shows_it(bundle: Bundle) -> None:
    found = there(bundle.manifest.population)
    assert {(one.kind, one.groups) for one in found.groups} == {("sex", ("F",)), ("sex", ("M",)), ("view", ("PA",))}
    card = bundle.read("card.md").decode()
    assert "- by view: PA views\n" in card
    assert "- by age: nobody\n" in card
    assert "Of 60 held-out images nobody stated the patient's age." in card


def test_reference_statistics_fit_the_graph(bundle: Bundle) -> None:
    reference = bundle.load_reference()
    assert reference.features.shape == (60, 128) and reference.pixel_statistics.shape == (60, 16)
    assert bundle.manifest.reference is not None and bundle.manifest.reference.sets == ("test",)
    assert np.all((reference.probabilities > 0) & (reference.probabilities < 1))
    assert reference.labels is not None and set(reference.labels.tolist()) == {0, 1}
    assert there(reference.sex).tolist().count("F") == 30 and set(there(reference.view).tolist()) == {"PA"}
    assert set(there(reference.age_group).tolist()) == {""}
    assert reference_of(bundle).kinds == ("sex", "view")


@given(patients=st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_reference_has_the_first_image_of_each_patient(patients: list[str]) -> None:
    kept = first_of_each(patients)
    assert [patients[row] for row in kept] == list(dict.fromkeys(patients)) and kept == sorted(kept)


def test_triton_serves_the_graph_under_its_own_names(bundle: Bundle) -> None:
    config = (bundle.folder / "triton/pneumofed/config.pbtxt").read_text()
    graph = onnx.load(bundle.folder / "triton/pneumofed/1/model.onnx").graph
    for tensor in (*graph.input, *graph.output):
        sizes = ", ".join(str(size.dim_value) for size in tensor.type.tensor_type.shape.dim[1:])
        assert f'name: "{tensor.name}" data_type: TYPE_FP32 dims: [ {sizes} ]' in config
    assert (bundle.folder / "triton/pneumofed/1/model.onnx").read_bytes() == bundle.read("model.onnx")


def test_another_network_than_the_runs_is_not_exported(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export_wrongly(network: nn.Module, _: int, __: int, path: Path) -> None:
        bias = classifier_of(network).bias.data
        bias[0] += 1e-3
        path.write_bytes(small_graph(network))
        bias[0] -= 1e-3

    monkeypatch.setattr(module, "export_onnx", export_wrongly)
    with pytest.raises(BundleError, match="differs from PyTorch"):
        export_run(ExportPlan(run.path, tmp_path / "bundle", signing_key()))
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_and_an_existing_bundle_are_refused(run: RunFolder, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never overwritten"):
        export_run(ExportPlan(run.path, bundle.folder, signing_key()))
    with pytest.raises(ConfigError, match="no run folder"):
        export_run(ExportPlan(tmp_path, tmp_path / "bundle", signing_key()))
    unfinished = RunFolder(tmp_path / "run")
    unfinished.prepare()
    unfinished.write_config(run.read_config())
    unfinished.write_summary(RunSummary(status="failed"))
    with pytest.raises(ConfigError, match="no run folder"):
        CliRunner().invoke(app, ["export", str(tmp_path / "nothing")], catch_exceptions=False, standalone_mode=False)
    assert not (tmp_path / "nothing").exists()  # nor a key in it
    with pytest.raises(BundleError, match="it is failed"):
        export_run(ExportPlan(unfinished.path, tmp_path / "bundle", signing_key()))


def test_the_command_makes_a_key_tells_its_fingerprint_and_takes_other_references(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "export_onnx", export_by_hand)
    monkeypatch.setattr(
        runtime, "load_runtime", lambda *_, **__: runtime.WebRuntime("1.2.3", "var a=1;export{a as b};", b"\0asm")
    )
    (run.path.parent / "central" / "notes.txt").write_text("no image")
    arguments = ["export", str(run.path), "--out", str(tmp_path / "b"), "--reference", str(run.path.parent / "central"), "--json"]
    arguments += ["--web", str(tmp_path / "page")]
    done = CliRunner().invoke(app, [*arguments, "--calibration", "none"], catch_exceptions=False)
    told = json.loads(done.stdout)
    found = load_bundle(Path(told["archive"]), None)
    assert told["signed_by"] == found.signer
    assert found.manifest.calibration.method == "none" and found.manifest.reference is not None
    assert found.manifest.reference.sets == ("reference",) and found.manifest.reference.images == 60
    assert "not calibrated" in found.read("card.md").decode()
    assert key_fingerprint(signing_key().public_key()) != found.signer
    contents, signer = check_contents(tmp_path / "page")
    assert (contents["bundle"], signer) == (found.digest, found.signer), "the page beside it is of this bundle, and signed alike"


def _central_squares(run: RunFolder) -> np.ndarray:
    from pneumofed.server.export.graph_checks import load_central

    (part,) = load_central(read_finished_run(run.path))
    return part.inputs(np.arange(len(part)))


def test_a_small_reference_and_refused_images_are_said_at_export_and_on_the_card(tmp_path: Path) -> None:
    said: list[str] = []
    small = write_finished_run(tmp_path / "small", patients=20)
    export_run(ExportPlan(small.path, tmp_path / "bundle", signing_key()), said.append)
    card = (tmp_path / "bundle" / "card.md").read_text()
    assert any("drift cannot be watched" in sentence for sentence in said) and "Drift cannot be watched" in card
    assert any("images cannot be judged" in sentence for sentence in said) and "| set | images | not judged |" in card


@pytest.mark.slow
def test_the_hospitals_limits_are_taken_and_named_where_enough_of_their_patients_scored(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    central = export_run(ExportPlan(run.path, tmp_path / "central", signing_key())).suitability
    assert central is not None
    scores = np.random.default_rng(0).gamma(9.0, 9.0, (2, 3, 100))
    sites = {f"site-{number}": pack_counts(count_scores(part)) for number, part in enumerate(scores)}
    kept = HospitalReference(round=1, suitability=central, sites=sites)

    def exported(name: str, reference: HospitalReference) -> tuple[list[str], str, Bundle]:
        said: list[str] = []
        copy.write_hospital_reference(reference)
        export_run(ExportPlan(copy.path, tmp_path / name, signing_key()), said.append)
        bundle = load_bundle(tmp_path / name, trusted=None)
        return [one for one in said if "hospital" in one and "limits" in one], (tmp_path / name / "card.md").read_text(), bundle

    said, card, bundle = exported("own", kept)
    assert there(bundle.manifest.suitability).limits.tolist() == kept.pooled().limits.tolist()
    assert "By hospital: site-0 " in said[0] and "site-1 " in card
    few = HospitalReference(round=1, suitability=central, sites={"site-0": sites["site-0"]})
    said, card, bundle = exported("few", few)
    assert there(bundle.manifest.suitability).limits.tolist() == central.limits.tolist()
    assert "too few" in said[0] and "By hospital" not in card
    _, card, _ = exported("other round", HospitalReference(round=2, suitability=central, sites=sites))
    assert "By hospital" not in card


def test_references_of_a_manifest_and_of_dicom_files_have_their_patients_groups(tmp_path: Path) -> None:
    image, grey = ImageConfig(size_px=32), np.rint(4095 * phantom_images(1)[0][0].pixels).astype(np.uint16)
    (tmp_path / "dicom").mkdir()
    write_dicom(tmp_path / "dicom" / "a.dcm", grey, BitsStored=12, PatientAge="070Y", PatientSex="M", ViewPosition="AP")
    found = load_folders([tmp_path / "dicom"], image)
    assert found.groups == (PatientGroups(AgeGroup.OLDER_ADULT, "M", "AP"),)
    record = ImageRecord(tmp_path / "dicom" / "a.dcm", "p", "normal", age_years=5.0)
    write_manifest(Manifest((record,)), tmp_path / "m.csv")
    assert load_folders([tmp_path / "m.csv"], image).groups == (PatientGroups(AgeGroup.CHILD),)


def with_second_set(run: RunFolder, folder: Path, *reference: str) -> Path:
    """A copy of the run whose coordinator also has the set `adults`: twenty other images, of patients of the same names."""
    copy = RunFolder(Path(shutil.copytree(run.path, folder / "run")))
    records = []
    for number, (image, label) in enumerate(phantom_images(20, seed=77)):
        file = folder / f"{number}.png"
        PIL.Image.fromarray(np.rint(image.pixels * 120).astype(np.uint8)).save(file)
        records.append(ImageRecord(file, f"patient-{number}", ("normal", "pneumonia")[label]))
    write_manifest(Manifest(tuple(records)), folder / "adults.csv")
    settings = yaml.safe_load((copy.path / "coordinator.yaml").read_text())
    settings |= {"run_dir": str(copy.path), "held_out": {"adults": str(folder / "adults.csv")}, "reference_sets": list(reference)}
    (copy.path / "coordinator.yaml").write_text(yaml.safe_dump(settings))
    return copy.path


def test_later_images_must_be_like_those_of_any_set_of_the_hospitals_own_patients(run: RunFolder, tmp_path: Path) -> None:
    path = with_second_set(run, tmp_path, "test", "adults")
    source, plan = read_finished_run(path), ExportPlan(path, tmp_path / "bundle", signing_key())
    central = load_central(source)
    own = find_reference(plan, source, central)
    reference = join_sets(own)
    assert (
        [part.name for part in own] == ["test", "adults"] and [len(part) for part in central] == [60, 20] and len(reference) == 80
    )
    np.testing.assert_array_equal(reference.pixels, np.concatenate([part.pixels for part in central]))
    assert reference.labels is not None and reference.labels.tolist() == [one for part in central for one in there(part.labels)]
    assert len(set(there(reference.patients))) == 80, "patient-0 of one set is not patient-0 of the other"
    assert len(reference.groups) == 80
    judged = there(build_central_evaluator(source.experiment, there(source.coordinator)).reference(2000))
    pixels = dict(zip(there(reference.patients), reference.pixels.tolist(), strict=True))
    assert dict(zip(judged.patients, judged.pixels.tolist(), strict=True)) == pixels
    few = there(build_central_evaluator(source.experiment, there(source.coordinator)).reference(30))
    for patients in (few.patients, [there(reference.patients)[row] for row in reference.draw("reference", 30)]):
        assert Counter(patient.split()[0] for patient in patients) == {"test": 15, "adults": 15}, "none is drowned"


def test_without_a_word_of_the_coordinator_the_first_set_alone_is_the_reference(run: RunFolder, tmp_path: Path) -> None:
    path = with_second_set(run, tmp_path)
    source = read_finished_run(path)
    central = load_central(source)
    (own,) = find_reference(ExportPlan(path, tmp_path / "bundle", signing_key()), source, central)
    assert own.name == "test" and join_sets([own]) is own is central[0]


def test_a_reference_set_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    for kind, more in ((CoordinatorConfig, {"run_dir": "."}), (CoordinatorSettings, {"federation": "f", "hosts": ["a.example"]})):
        with pytest.raises(ConfigError, match="there is no held-out set adult; there are test, adults"):
            build_config(
                kind, {**more, "test_manifest": "t.csv", "held_out": {"adults": "a.csv"}, "reference_sets": ["adult"]}, "it"
            )


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"test": 0.01, "adults": 0.01, "far": 0.5}, True),
        ({"test": 0.01, "adults": 0.05, "far": 0.0}, False),
        ({"test": 0.03, "adults": 0.0, "far": 0.0}, False),
    ],
)
def test_int8_must_be_good_on_every_set_of_the_reference(
    changes: dict[str, float], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is shown, not judged, on sets of other hospitals."""
    sets = [ExportImages(name, np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1]), {}) for name in changes]
    area = IntervalEstimate(value=0.9)

    def measured(part: ExportImages, *_: object) -> Quantization:
        return Quantization(
            name=part.name,
            images=4,
            calibration_images=4,
            auroc_float32=area,
            auroc_int8=area,
            mean_difference=changes[part.name],
            max_difference=0.5,
            changed_decisions=0,
        )

    monkeypatch.setattr(module, "quantize_onnx", lambda _, target, batches: target.write_bytes(b"".join(map(bytes, batches))))
    monkeypatch.setattr(module, "measure_quantization", measured)
    found = module._quantize(tmp_path, sets[:2], sets, Calibration(), 0.5, lambda _: None)
    assert [one.name for one in found] == (list(changes) if kept else [])
    assert (tmp_path / QUANTIZED).exists() is kept
