"""A run with clinical values, from a federation to a bundle that is asked with values, with some and with none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import pneumofed
from pneumofed.common.data.manifest import read_manifest, write_manifest
from pneumofed.common.errors import ArgumentError, ConfigError, DataError
from pneumofed.common.model_bundle.calibration import pneumonia_score
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.common.wire.keys import NodeKey, parse_private_key
from pneumofed.inference.cli.predict import predict_command
from pneumofed.inference.predict.clinical_table import values_of
from pneumofed.server.export.export import ExportPlan, export_run
from tests.client.federation.test_clinical_sums import CLINICAL, with_values
from tests.model_bundles import make_bundle
from tests.tiny import TinyFederation, tiny_experiment

app = typer.Typer()
app.command()(predict_command)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clinical")
    federation = TinyFederation(folder, sites=2, patients=24)
    for name in (*(federation.sites / f"site-{number}" / "manifest.csv" for number in range(2)), folder / "test.csv"):
        write_manifest(with_values(read_manifest(name), 0), name)
    federation.run("run", tiny_experiment(clinical={**CLINICAL, "fusion": "film"}))
    (folder / "run" / "coordinator").mkdir()
    settings = {"run_dir": str(folder / "run"), "test_manifest": str(folder / "test.csv"), "device": "cpu"}
    (folder / "run" / "coordinator" / "coordinator.yaml").write_text(yaml.safe_dump(settings))
    key = parse_private_key(NodeKey.generate("coordinator").private, "test")
    export_run(ExportPlan(folder / "run", folder / "bundle", key))
    return folder


@pytest.mark.slow
def test_a_bundle_answers_with_its_values_with_some_and_with_none(exported: Path) -> None:
    bundle, image = pneumofed.open_bundle(exported / "bundle"), exported / "test" / "1-0.png"
    schema = bundle.clinical
    assert schema is not None and schema.columns[0].mean is not None and "standardised by" in bundle.card
    given = {"temperature": 40.5, "crp": 150.0, "smoker": False}
    both, few, none = bundle.predict([image] * 3, clinical=[given, {"temperature": 40.5}, None])
    alone = bundle.predict(image)
    assert none.image_only is None and (none.probability, alone.image_only) == (alone.probability, None)
    network = bundle.network
    assert isinstance(network, ClinicalNetwork)
    square = torch.from_numpy(bundle.predictor.prepare(bundle.predictor.read(image).image))[None, None]
    from pneumofed.common.imaging.augment import normalize

    for answer, values in ((both, given), (few, {"temperature": 40.5}), (alone, {})):
        with torch.no_grad():
            logits = network(normalize(square, 1), torch.from_numpy(values_of(values, schema))[None]).numpy()
        expected = bundle.manifest.calibration.probability(pneumonia_score(logits))[0]
        if answer.status == "judged":
            assert answer.probability == pytest.approx(float(expected), abs=1e-4)
            assert answer.image_only == (None if not values else pytest.approx(alone.probability, abs=1e-6))
    with pytest.raises(ArgumentError, match="is it Fahrenheit"):
        bundle.predict(image, clinical={"temperature": 98.6})
    with pytest.raises(ArgumentError, match="for each of 2 images"):
        bundle.predict([image, image], clinical=[given])


@pytest.mark.slow
def test_predict_takes_a_table_and_refuses_one_that_does_not_fit_before_any_image(exported: Path) -> None:
    bundle, image, table = str(exported / "bundle"), str(exported / "test" / "0-0.png"), exported / "values.csv"
    table.write_text("file,Temperature [°F],smoker\n0-0.png,101.3,yes\n")
    found = CliRunner().invoke(app, [image, "--bundle", bundle, "--clinical", str(table), "--json", "--quiet"])
    (row,) = json.loads(found.stdout)["images"]
    assert row["clinical"] == {"temperature": "temperature 38.5 °C", "smoker": "smoker yes"}
    assert (row["image_only"] is None) == (row["status"] != "judged")
    table.write_text("file,temperature\n0-0.png,101.3\n")
    refused = CliRunner().invoke(app, [image, "--bundle", bundle, "--clinical", str(table), "--csv", str(exported / "out.csv")])
    assert isinstance(refused.exception, DataError) and "is it Fahrenheit" in str(refused.exception)
    assert not (exported / "out.csv").exists()


@pytest.mark.slow
def test_the_map_is_of_the_image_beside_its_values(exported: Path) -> None:
    bundle = pneumofed.open_bundle(exported / "bundle")
    image = exported / "test" / "1-0.png"
    if bundle.predict(image).status != "judged":
        pytest.skip("the tiny reference refuses this image")
    found = pneumofed.explain(bundle, image, check=False, clinical={"temperature": 40.5})
    assert found.evidence is not None and set(found.evidence.values) == {"temperature"} and "rests on" in found.lines[0]
    assert pneumofed.explain(bundle, image, check=False).evidence is None
    assert isinstance(bundle.network, ClinicalNetwork) and bundle.network.given is None
    assert np.isfinite(found.map).all()


def test_a_model_without_clinical_values_takes_none(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    bundle = pneumofed.open_bundle(tmp_path / "bundle")
    assert bundle.clinical is None
    with pytest.raises(ArgumentError, match="takes no clinical values"):
        bundle.predict(np.zeros((64, 64), np.float32), clinical={"temperature": 38.0})
    refused = CliRunner().invoke(app, ["x.png", "--bundle", str(tmp_path / "bundle"), "--clinical", "t.csv"])
    assert isinstance(refused.exception, ConfigError)
