"""A site judges two models on patients whom neither was trained on; a simulated run goes through the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pneumofed.client.cli.bundles import compare
from pneumofed.client.data.bundles import compare_at_site
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import classifier_of
from pneumofed.common.release import read_verdict
from pneumofed.common.wire.keys import format_public_key, read_public_key, write_node_key
from tests.model_bundles import signing_key
from tests.server.release.models import network, seal_network
from tests.tiny import TinyFederation, tiny_experiment


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return read_site_config(TinyFederation(tmp_path / "f", sites=1, patients=40).sites / "0.yaml")


def test_patients_count_who_were_kept_from_both_models(config: SiteConfig, tmp_path: Path) -> None:
    old, new = seal_network(tmp_path / "old", network(0), split_seed=1), seal_network(tmp_path / "new", network(1), split_seed=2)
    told = compare_at_site(config, old, new)
    kept = [set(load_site(config, tiny_experiment(seed=seed)).validation.patients) for seed in (1, 2)]
    assert sum(told.comparison.patients) == len(kept[0] & kept[1]) < len(kept[0])
    assert (told.site, told.old, told.new) == ("site-0", old.digest, new.digest)


def test_images_that_join_do_not_bring_trained_patients_into_the_comparison(config: SiteConfig, tmp_path: Path) -> None:
    from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
    from tests.tiny import draw_manifest

    trained = set(load_site(config, tiny_experiment()).train.patients)
    more = draw_manifest(tmp_path / "more", 40, seed=77)
    records = read_manifest(Path(config.manifest)).records
    write_manifest(Manifest((*records, *more.records)), Path(config.manifest))
    grown = load_site(config, tiny_experiment())
    assert not trained & set(grown.validation.patients)
    told = compare_at_site(config, seal_network(tmp_path / "old", network(0)), seal_network(tmp_path / "new", network(1)))
    assert sum(told.comparison.patients) == len(set(grown.validation.patients)) == 20


def test_a_bundle_that_does_not_say_on_whom_it_was_trained_is_not_compared(config: SiteConfig, tmp_path: Path) -> None:
    old, new = seal_network(tmp_path / "old", network(0), split_seed=None), seal_network(tmp_path / "new", network(1))
    with pytest.raises(ConfigError, match="does not say"):
        compare_at_site(config, old, new)
    with pytest.raises(ConfigError, match="is the old one"):
        compare_at_site(config, new, new)


def test_no_common_validation_patient_is_a_verdict_of_nothing(config: SiteConfig, tmp_path: Path) -> None:
    """Of forty patients each draw keeps one, and not the same."""
    old, new = (seal_network(tmp_path / str(seed), network(seed), split_seed=seed, fraction=0.01) for seed in (1, 2))
    comparison = compare_at_site(config, old, new).comparison
    assert (comparison.auroc.old, comparison.patients, comparison.images) == (None, (0, 0), 0)


def test_the_command_signs_with_the_site_s_key_and_tells_no_patient(config: SiteConfig, tmp_path: Path) -> None:
    site = tmp_path / "site"
    public = write_node_key(site / "keys", "north")
    (site / "connection.yaml").write_text("coordinator: fl.example.org:9443\n")
    told = {"name": "north", "manifest": config.manifest, "work_dir": str(site / "work"), "device": "cpu"}
    (site / "site.yaml").write_text(yaml.safe_dump(told))
    seal_network(tmp_path / "old", network(0))
    seal_network(tmp_path / "new", network(1))
    (tmp_path / "coordinator.pub").write_bytes(format_public_key(signing_key().public_key(), "c"))
    import typer

    app = typer.Typer()
    app.command()(compare)
    out = tmp_path / "verdict.json"
    options = ["--out", str(out), "--trusted", str(tmp_path / "coordinator.pub"), "--site", str(site)]
    result = CliRunner().invoke(app, [str(tmp_path / "old"), str(tmp_path / "new"), *options])
    assert result.exit_code == 0, result.output
    assert read_verdict(out, {"north": read_public_key(public)}).site == "north"
    assert "patient-" not in out.read_text() + result.output
    assert "models-compared" in (site / "work" / "audit.jsonl").read_text()


def test_a_simulated_run_passes_the_gate_or_is_refused_by_exit_code(tmp_path: Path) -> None:
    """The same network twice in all but one bit of its bias: equal everywhere, so only the number of cases decides."""
    import torch

    from pneumofed.cli.main import app

    federation = TinyFederation(tmp_path / "run", sites=1, patients=40)
    (tmp_path / "run" / "simulation.yaml").write_text("{}")
    (tmp_path / "run" / "coordinator.yaml").write_text(
        yaml.safe_dump(
            {
                "run_dir": str(tmp_path / "run"),
                "test_manifest": str(federation.folder / "test.csv"),
                "external_manifest": str(federation.folder / "test.csv"),
                "device": "cpu",
            }
        )
    )
    model = network(0)
    seal_network(tmp_path / "old", model, sites=1)
    with torch.no_grad():
        classifier_of(model).bias.add_(1e-6)
    seal_network(tmp_path / "new", model, sites=1)
    key = tmp_path / "key"
    from cryptography.hazmat.primitives import serialization

    key.write_bytes(
        signing_key().private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    (tmp_path / "release.yaml").write_text(
        "floor: {auroc: 0, sensitivity: 0, specificity: 0}\nmargins: {auroc: 0.49, point: 0.49, alpha: 0.3}\n"
    )
    shared = ["--run", str(tmp_path / "run"), "--key", str(key)]
    policy = ["--policy", str(tmp_path / "release.yaml")]
    words = ["release", str(tmp_path / "new"), "--against", str(tmp_path / "old"), *shared, *policy]
    assert CliRunner().invoke(app, ["release", str(tmp_path / "old"), "--first", *shared]).exit_code == 4, "below the floor"
    first = CliRunner().invoke(app, ["release", str(tmp_path / "old"), "--first", *shared, *policy])
    assert first.exit_code == 0, first.output
    narrow = ["--margin", "0.02", "--point-margin", "0.05", "--alpha", "0.05"]
    refused = CliRunner().invoke(app, [*words, *narrow, "--json"])
    assert refused.exit_code == 4, refused.output
    told = json.loads(refused.stdout)
    assert told["decision"] == "refused" and all("not enough data" in reason for reason in told["reasons"])
    assert [place["name"] for place in told["places"]] == ["test", "external", "site-0"]
    assert not (tmp_path / "new.release.json").exists()
    released = CliRunner().invoke(app, words)
    assert released.exit_code == 0, released.output
    assert (tmp_path / "new.release.json").is_file() and (tmp_path / "run" / "release.md").read_text().startswith("# Released")


def test_release_needs_something_to_compare_with(tmp_path: Path) -> None:
    from pneumofed.cli.main import app

    result = CliRunner().invoke(app, ["release", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert "--first" in str(result.exception)
