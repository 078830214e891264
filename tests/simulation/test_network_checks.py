"""A study's own network from the first check to a run, its resume, its bundle and its explanations."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pneumofed
from pneumofed.client.federation.training import RoundPlan
from pneumofed.client.privacy.dp_sgd import PrivateRound, build_private_setup
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import load_experiment, merge
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.errors import BundleError, CheckpointError, ConfigError
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.evaluate import predictions_of
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.features import predict_probabilities
from pneumofed.common.ops import study_code
from pneumofed.inference.explain.attribution import compute_attribution
from pneumofed.inference.explain.cam import LogOdds, finer_layer, grad_cam, target_layer
from pneumofed.simulation import network_checks
from pneumofed.simulation.network_checks import NetworkFinding, check_network, check_study
from tests.own_network import LOSS, NETWORK, write

SMALL: dict[str, Any] = {"phantoms": 24, "hospitals": 2, "rounds": 2, "image_size": 32, "seed": 3}
PRIVATE = {
    "privacy": {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "expected_batch_size": 8},
    "loss": {"logit_adjustment": False},
    "model": {"norm": "group"},
}
MIXING = """
from torch import nn
class build(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        return self.fc(x - x.detach().mean(dim=0))
"""
STATISTICS = """
import torch
from torch import nn
class build(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))
    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        if self.training:
            self.seen += x.detach().sum(dim=0)
        return self.fc(x)
"""
FLAT = """
from torch import nn
def build(classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 32 * 32, 8), nn.Tanh(), nn.Linear(8, classes))
"""
DILATED = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""
DEEP_HEAD = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""
BRANCHING = """
from torch import nn
class build(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 2)
    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)) if float(x.mean()) > 0 else x.amax(dim=(2, 3)))
"""


def experiment_of(folder: Path, source: str, **changes: Any) -> ExperimentConfig:
    function = "build_net" if source == NETWORK else "build"
    name = f"{write(folder, source)}:{function}"
    return load_experiment(None, merge({"model": {"name": name}, "image": {"size_px": 32}}, changes))


def rows(experiment: ExperimentConfig) -> dict[str, NetworkFinding]:
    """By name."""
    return {found.name: found for found in check_network(experiment)}


@pytest.mark.slow
def test_the_table_of_a_usual_network(tmp_path: Path) -> None:
    found = rows(experiment_of(tmp_path, NETWORK))
    assert {name: row.answer for name, row in found.items()} == dict.fromkeys(
        ("code", "size", "repeatable", "training", "BatchNorm", "private training", "export", "explanations"), "yes"
    )
    numbers = 8 * 9 + 8 + 16 + 16 * 8 * 9 + 16 + 32 + 16 * 2 + 2
    statistics = 2 * (8 + 16)
    assert f"{numbers:,} parameters; {4 * (numbers + statistics) / 1e3:.3g} kB down" in found["size"].text
    assert "images [N, 1, 32, 32] to logits [N, 2]; a step changes all 10 trained tensors" in found["training"].text
    assert "Grad-CAM at body, finer-layer at body.2" in found["explanations"].text
    half = experiment_of(tmp_path, NETWORK, strategy={"update_precision": "float16"})
    assert f"{(2 * numbers + 4 * statistics) / 1e3:.3g} kB up" in rows(half)["size"].text


def test_maps_are_made_of_the_layers_that_the_trace_found(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, NETWORK, model={"in_channels": 3})
    network, image = build_model(experiment.model, experiment.task, 0).eval(), torch.rand(1, 1, 32, 32)
    assert target_layer(network) is network.body and finer_layer(network) is network.get_submodule("body.2")
    assert grad_cam(LogOdds(network, "pneumonia"), image).shape == (8, 8)
    flat = build_model(experiment_of(tmp_path, FLAT, model={"in_channels": 3}).model, "binary", 0).eval()
    assert compute_attribution(flat, image, "integrated-gradients").values.shape == (32, 32)
    with pytest.raises(ConfigError, match="averages no feature maps over the picture; integrated-gradients"):
        grad_cam(LogOdds(flat, "pneumonia"), image)


@pytest.mark.parametrize(
    ("source", "row", "answer", "text"),
    [
        (MIXING, "private training", "no", "fc gives an image another result beside other images"),
        (STATISTICS, "private training", "no", "seen keeps statistics of the images that it sees"),
        (DILATED, "private training", "no", "private training knows no dilation"),
        (FLAT, "private training", "yes", ""),
        (FLAT, "explanations", "note", "no Grad-CAM"),
        (DEEP_HEAD, "explanations", "note", "Grad-CAM at 0, without finer-layer, but more layers follow its averages"),
        (BRANCHING, "export", "no", "no model bundle can be made"),
        (NETWORK.replace("from torch", "import numpy, random\nfrom torch", 1), "packages", "", ""),
        ("import pytest" + NETWORK, "packages", "note", "net.py imports pytest, which pneumofed does not bring along"),
        (
            NETWORK.replace(
                "self.drop =", "Net.built = getattr(Net, 'built', 0) + 1; self.fc2 = nn.Linear(1, Net.built); self.drop ="
            ),
            "repeatable",
            "note",
            "",
        ),
        (NETWORK.replace("self.drop =", "self.unused = nn.Linear(2, 2); self.drop ="), "training", "note", "unused.weight"),
    ],
)
def test_what_a_network_cannot_do_is_a_row(
    source: str, row: str, answer: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row != "export":  # a graph takes seconds
        monkeypatch.setattr(network_checks, "_graph", lambda *_: NetworkFinding("export", "yes", ""))
    source = source.replace("def build_net", "def build")
    found = rows(experiment_of(tmp_path, source)).get(row)
    assert (found is None) if not answer else (found is not None and found.answer == answer and text in found.text), found


def test_a_run_is_refused_only_for_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_checks, "_graph", lambda *_: NetworkFinding("export", "no", ""))
    said: list[str] = []
    assert check_study(experiment_of(tmp_path, DILATED), said.append)
    assert any("no    private training: 0: private training knows no dilation" in line for line in said)
    with pytest.raises(ConfigError, match="private training knows no dilation"):
        check_study(experiment_of(tmp_path, DILATED, **PRIVATE), said.append)
    with pytest.raises(ConfigError, match=r"training: images of 64 px: RuntimeError"):
        check_study(experiment_of(tmp_path, FLAT, image={"size_px": 64}), said.append)
    with pytest.raises(ConfigError, match="'last_block' is not known of a study's own network"):
        experiment_of(tmp_path, NETWORK, model={"freeze": "last_block"})


def test_a_site_refuses_a_private_round_of_a_network_or_loss_that_mixes_images(tmp_path: Path) -> None:
    """By itself: the coordinator's checks are none of the hospital's."""
    mean = "def build(): return lambda z, y: (z - z.mean(dim=0)).logsumexp(dim=1).mean()\n"
    for source, loss, sentence in (
        (MIXING, "", "fc gives an image another"),
        (FLAT, mean, "no image's loss may depend on another"),
    ):
        changes = merge(PRIVATE, {"loss": {"name": f"{write(tmp_path, loss, 'loss.py')}:build"}} if loss else {})
        experiment = experiment_of(tmp_path, source, **changes)
        private = PrivateRound(SitePlan("image", 0.5, 4, 1, 1e-3, "prv", 6.0, 1.0), bytes(32), 4.0)
        with pytest.raises(ConfigError, match=sentence):
            build_private_setup(
                build_model(experiment.model, experiment.task, 0),
                private,
                RoundPlan(experiment, 1, "site"),
                build_compute("cpu", "fp32"),
            )


@pytest.mark.slow
def test_a_run_has_the_same_weights_with_workers_and_says_whose_network_it_is(tmp_path: Path) -> None:
    file, loss = write(tmp_path), write(tmp_path, LOSS, "loss.py")
    said: list[str] = []
    options = {**SMALL, "model": f"{file}:build_net", "loss": f"{loss}:build_loss"}
    one = pneumofed.simulate(**options, workers=1, out=tmp_path / "one", progress=said.append)
    two = pneumofed.simulate(**options, workers=2, out=tmp_path / "two")
    assert one.status == two.status == "succeeded"
    assert all(np.array_equal(value, two.weights()[name]) for name, value in one.weights().items())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert any(f"code: net.py:build_net, SHA-256 {digest}" in line for line in said)
    assert (
        f"A network of the study&#39;s own, build_net (SHA-256 {digest[:12]}) was trained with FedAvg" in one.report.read_text()
    )
    assert one.config["model"]["name"] == f"study:{digest}:build_net"
    assert (one.folder / "study_code" / "net.py").read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_private_run_trains_a_studys_own_network_and_loss(tmp_path: Path) -> None:
    file, loss = write(tmp_path), write(tmp_path, LOSS, "loss.py")
    options = {**SMALL, "rounds": 1, "model": f"{file}:build_net", "loss": f"{loss}:build_loss", "set": PRIVATE, "workers": 1}
    run = pneumofed.simulate(**options, out=tmp_path / "run")
    assert run.status == "succeeded" and not any("running" in name for name in run.weights())
    mixing = write(tmp_path, MIXING)
    with pytest.raises(ConfigError, match="private training: fc gives an image another result"):
        pneumofed.simulate(**{**options, "model": f"{mixing}:build"}, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path(sys.executable).with_name("flwr-simulation").is_file(), reason="flwr[simulation] is not installed")
def test_flowers_engine_gives_the_same_weights_from_the_app_bundle(tmp_path: Path) -> None:
    options = {**SMALL, "model": f"{write(tmp_path)}:build_net"}
    local = pneumofed.simulate(**options, out=tmp_path / "local", workers=1)
    flower = pneumofed.simulate(**options, out=tmp_path / "flower", engine="flower")
    assert all(np.array_equal(value, flower.weights()[name]) for name, value in local.weights().items())


@pytest.mark.slow
def test_a_resumed_run_takes_its_own_copy_and_refuses_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    options = {**SMALL, "workers": 1}
    whole = pneumofed.simulate(**options, model=f"{file}:build_net", out=tmp_path / "whole")
    _stop_after_a_round(tmp_path / "part", options, file)
    file.write_text(NETWORK.replace("Dropout(0.1)", "Dropout(0.5)"))
    monkeypatch.setattr(study_code, "_known", {})  # as in another process
    with pytest.raises(
        CheckpointError, match=r"net.py:build_net is not the code that the run .* was started with.*leave out --model"
    ):
        pneumofed.simulate(model=f"{file}:build_net", out=tmp_path / "part", resume=True)
    resumed = pneumofed.simulate(out=tmp_path / "part", resume=True, workers=2)
    assert all(np.array_equal(value, resumed.weights()[name]) for name, value in whole.weights().items())


def _stop_after_a_round(folder: Path, options: dict[str, Any], file: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("round   1"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pneumofed.simulate(**options, model=f"{file}:build_net", out=folder, progress=stop)


def test_predictions_of_a_bundle_need_no_code_and_explanations_ask_for_consent(tmp_path: Path) -> None:
    file = write(tmp_path)
    run = pneumofed.simulate(**{**SMALL, "phantoms": 60}, model=f"{file}:build_net", out=tmp_path / "run", workers=1)
    run.export(tmp_path / "bundle")
    file.unlink()
    image = next((tmp_path / "run" / "phantoms").rglob("*.jpeg"))
    program = (
        "import sys, builtins, pneumofed; from pneumofed.common.ops import study_code;"
        "study_code.load_function = None;"
        "b = pneumofed.open_bundle(sys.argv[1]); print(b.predict(sys.argv[2]).status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "bundle.zip", image], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "False" and "unreadable" not in done.stdout
    bundle = load_bundle(tmp_path / "bundle.zip", None)
    assert "study_code/net.py" in bundle.manifest.files
    assert f"`{hashlib.sha256(NETWORK.encode()).hexdigest()}`" in (tmp_path / "bundle" / "card.md").read_text()
    with pytest.raises(BundleError, match=r"read study_code/net.py in the bundle first, then give --run-bundle-code"):
        bundle.load_network()
    with pytest.raises(BundleError, match="run_code=True"):
        _ = pneumofed.open_bundle(tmp_path / "bundle").network
    network = pneumofed.open_bundle(tmp_path / "bundle", run_code=True).network
    assert type(network).__name__ == "Net"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 32, 32), dtype=np.uint8)
    images = Dataset(pixels, np.zeros(70, np.int64), ("p",) * 70, ("d",) * 70, DataReport())
    exact = predict_probabilities(network, images, build_compute("cpu", "fp32"), 1, 64)
    by_graph = predictions_of(bundle, images, build_compute("cpu", "fp32")).probabilities  # no consent was given to this one
    np.testing.assert_allclose(by_graph, exact, atol=1e-5)


def test_a_class_in_a_file_is_taken_as_it_is_and_one_without_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("net_of_a_test", write(tmp_path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "net_of_a_test", module)
    spec.loader.exec_module(module)
    assert study_code.study_code_of(module.Net).name == f"study:{hashlib.sha256(NETWORK.encode()).hexdigest()}:Net"
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    makers: list[Any] = [names["Net"], lambda: None, 7]
    for maker in makers:
        with pytest.raises(ConfigError, match="no function or class at the top of a file"):
            pneumofed.simulate(model=maker)
