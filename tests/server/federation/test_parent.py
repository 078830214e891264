"""A run that goes on from a model bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pneumofed.common.errors import BundleError, ConfigError, WeightsError
from pneumofed.common.model_bundle.bundle import (
    Bundle,
    check_start,
    load_bundle,
    open_trusted,
    pack,
    read_start_weights,
    start_values,
)
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.keys import format_public_key
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.report.read_run import read_run
from pneumofed.server.report.report import _reproduction
from pneumofed.server.runs.checkpoints import read_checkpoint
from tests.model_bundles import signing_key
from tests.server.release.models import network, seal_network
from tests.tiny import TinyFederation, there, tiny_experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seal_network(tmp_path_factory.mktemp("bundle") / "model", network(7)).folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder, None)


def weights_of(model: torch.nn.Module) -> Sequence[np.ndarray]:
    return ArraysLayout.of(model).flatten(model)


def test_a_run_starts_from_the_bundle_s_weights_and_says_so(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    experiment = tiny_experiment(**start_values(bundle, folder), rounds=1)
    started = build_model(experiment.model, experiment.task, seed=99, weights=read_start_weights(experiment.model))
    np.testing.assert_array_equal(weights_of(started)[0], weights_of(network(7))[0])
    summary = TinyFederation(tmp_path, sites=2).run("run", experiment)
    assert summary.status == "succeeded"
    assert there(summary.parent).digest == bundle.digest
    assert there(summary.parent).trained_privately is False
    assert _reproduction(read_run(tmp_path / "run"))["parent"] == (
        f"model bundle model {bundle.digest}, trained without differential privacy"
    )


def test_an_archive_does_as_well_as_a_folder(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "model.zip")
    experiment = tiny_experiment(**start_values(open_trusted(archive, []), archive))
    started = build_model(experiment.model, experiment.task, seed=0, weights=read_start_weights(experiment.model))
    np.testing.assert_array_equal(weights_of(started)[0], weights_of(network(7))[0])


def test_another_network_or_task_is_refused_with_both_names(folder: Path, bundle: Bundle) -> None:
    start = start_values(bundle, folder)
    other = tiny_experiment(**{**start, "model": {**start["model"], "name": "resnet18"}})
    with pytest.raises(ConfigError, match=r"model\.name is 'small_cnn', not 'resnet18'"):
        check_start(other, bundle)
    with pytest.raises(WeightsError, match="name is 'small_cnn', not 'resnet18'"):
        read_start_weights(other.model)
    with pytest.raises(ConfigError, match="task is 'binary', not 'three_class'"):
        check_start(tiny_experiment(**start, task="three_class"), bundle)


def test_a_bundle_that_was_exchanged_after_the_run_was_submitted_is_refused(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    other = seal_network(tmp_path / "other", network(8)).folder
    exchanged = tiny_experiment(**{**start_values(bundle, folder), "model": {"weights": str(other)}})
    with pytest.raises(ConfigError, match="not the bundle that the run was to start from"):
        TinyFederation(tmp_path / "f", sites=1).run("run", exchanged)
    told = json.loads((tmp_path / "f" / "run" / "summary.json").read_text())
    assert told["status"] == "failed" and bundle.digest in told["error"]


def test_a_bundle_of_a_stranger_is_refused_where_keys_are_given(folder: Path, tmp_path: Path) -> None:
    from pneumofed.common.wire.keys import NodeKey

    (tmp_path / "stranger.pub").write_bytes(NodeKey.generate("stranger").public)
    (tmp_path / "known.pub").write_bytes(format_public_key(signing_key().public_key(), "known"))
    with pytest.raises(BundleError, match="does not trust"):
        open_trusted(folder, [tmp_path / "stranger.pub"])
    assert open_trusted(folder, [tmp_path / "stranger.pub", tmp_path / "known.pub"]).digest


def test_a_changed_weight_file_is_not_started_from(folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    content = bytearray((broken / "weights.pt").read_bytes())
    content[-100] ^= 1
    (broken / "weights.pt").write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=r"weights\.pt was changed"):
        read_start_weights(tiny_experiment(model={"weights": str(broken)}).model)


def test_a_resumed_run_needs_the_bundle_no_more(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import pneumofed.server.federation.run

    gone = Path(shutil.copytree(folder, tmp_path / "gone"))
    experiment = tiny_experiment(**start_values(bundle, gone))
    federation, real = TinyFederation(tmp_path / "f", sites=1), pneumofed.server.federation.run._keep_round

    def interrupt(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(pneumofed.server.federation.run, "_keep_round", interrupt)
    with pytest.raises(KeyboardInterrupt):
        federation.run("run", experiment)
    monkeypatch.undo()
    shutil.rmtree(gone)
    summary = federation.run("run", experiment, resume=True)
    assert (summary.status, there(summary.parent).digest) == ("succeeded", bundle.digest)
    assert there(summary.parent).name == bundle.manifest.name
    assert read_checkpoint(tmp_path / "f" / "run" / "checkpoints" / "last.pt").experiment.parent == bundle.digest
