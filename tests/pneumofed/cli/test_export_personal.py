"""`pneumofed site export-personal`: the site's own model, whole, as a bundle in its own folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pneumofed.cli.site import take_study_code
from pneumofed.client.federation.ditto import find_personal_run
from pneumofed.client.federation.judging import evaluate_model
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import ConfigError, EmptySiteError
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.ops import study_code
from pneumofed.common.ops.app_bundle import write_app
from pneumofed.common.ops.study_code import read_study_code
from pneumofed.common.wire.keys import read_public_key
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.former.opened import call
from tests.own_network import write
from tests.tiny import TinyFederation, tiny_experiment


def test_the_bundle_holds_the_own_model_and_what_the_sites_validation_patients_say_of_it(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=24)
    experiment = tiny_experiment(personal={"method": "ditto"})
    federation.run("run", experiment)
    folder = federation.sites / "site-0"
    config = read_site_config(federation.sites / "0.yaml")
    (tmp_path / "simulation.yaml").write_text("hospitals: 1\n")  # a virtual hospital's folder, below RUN/sites
    told = json.loads(call("site", "export-personal", "pneumonia", "--site", folder, "--json"))
    bundle, own = (
        load_bundle(Path(told["bundle"]), [read_public_key(Path(told["public_key"]))]),
        find_personal_run(folder, told["run"]),
    )
    parameters, statistics = ArraysLayout.of(bundle.load_network()).flatten(bundle.load_network())
    np.testing.assert_array_equal(parameters, own.arrays.parameters)
    np.testing.assert_array_equal(statistics, own.arrays.statistics)
    network = build_model(experiment.model, experiment.task, seed=0)
    ArraysLayout.of(network).load(network, parameters, statistics)
    site = load_site(config, experiment)
    oracle = evaluate_model(network.eval(), site, experiment, build_compute("cpu", "fp32", threads=1))
    (judged,) = bundle.manifest.card.measured
    assert (
        (judged.images, judged.positives)
        == (oracle.n, oracle.n_positive)
        == (len(site.validation.labels), told["validation"]["n_positive"])
    )
    assert bundle.manifest.card.virtual and bundle.manifest.card.sites == 1 and bundle.manifest.card.privacy is None
    assert "own model of site-0" in (Path(told["bundle"]) / "card.md").read_text()
    assert Path(told["bundle"]).is_relative_to(folder / "personal")
    assert not (folder / "cache" / "own-model-export").exists()
    with pytest.raises(ConfigError, match="never overwritten"):
        call("site", "export-personal", "--site", folder)


def test_a_studys_own_network_is_that_of_an_app_that_the_hospital_approves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = read_study_code(f"{write(tmp_path)}:build_net")
    experiment, app = tiny_experiment(model={"name": code.name}), "ab" * 32
    write_app(tmp_path / "work" / "apps" / app, [code])
    policy, work = tmp_path / "policy.yaml", str(tmp_path / "work")
    config = SiteConfig(name="north", manifest="m.csv", work_dir=work, policy=str(policy))
    for approved in (False, True):
        monkeypatch.setattr(study_code, "_known", {})
        policy.write_text(f"approved_apps: [{f'{chr(34)}{app}{chr(34)}' if approved else ''}]\n")
        take_study_code(config, experiment, None)
        assert (code.name in study_code._known) is approved


def test_too_few_validation_patients_are_named_in_a_sentence(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1)
    federation.run("run", tiny_experiment(rounds=1, personal={"method": "ditto"}))
    (tmp_path / "simulation.yaml").write_text("hospitals: 1\n")
    with pytest.raises(EmptySiteError, match="2 validation patients"):
        call("site", "export-personal", "--site", federation.sites / "site-0")


def test_a_folder_of_no_site_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a site folder"):
        call("site", "export-personal", "--site", tmp_path)
