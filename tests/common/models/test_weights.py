"""First weights: torchvision's files fit, a file comes back, and what does not fit is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import WeightsError
from pneumofed.common.models.architectures import ARCHITECTURES, build_architecture
from pneumofed.common.models.build import build_model, classifier_of, load_state, read_state
from pneumofed.common.models.compute import import_torchvision

NAMES: tuple[ModelName, ...] = get_args(ModelName)
SMALL = build_architecture(ModelConfig(name="small_cnn"), 2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of torch.hub on a machine without network."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def state_of_torchvision(name: str) -> dict[str, torch.Tensor]:
    """Names and shapes as in torchvision's ImageNet file, without values."""
    with torch.device("meta"):
        return import_torchvision().models.get_model(name).state_dict()


@pytest.mark.parametrize(
    ("name", "norm", "in_channels"),
    [("resnet18", "group", 3), *((name, "batch", 1) for name in NAMES if ARCHITECTURES[name].imagenet)],
)
def test_torchvisions_files_fit_but_for_their_classifier(name: ModelName, norm: Any, in_channels: Any) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name, norm=norm, in_channels=in_channels), "binary", 0)
    left_out = load_state(model, state_of_torchvision(ARCHITECTURES[name].imagenet or ""), "file")
    running = {key for key in left_out if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert {key.split(".")[0] for key in set(left_out) - running} == {ARCHITECTURES[name].head.split(".")[0]}
    assert bool(running) == (norm == "group")


def test_grey_network_answers_as_the_colour_network_to_the_image_repeated() -> None:
    colour, grey = (build_architecture(ModelConfig(name="small_cnn", in_channels=channels), 2).eval() for channels in (3, 1))
    load_state(grey, colour.state_dict(), "file")
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)))


def test_densenet_keys_of_old_files_are_understood() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name="densenet121"), "binary", 0)
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in model.state_dict().items()}
    assert any("denselayer1.norm.1.weight" in key for key in old)
    assert load_state(model, old, "file") == ()


@pytest.mark.parametrize("nested", [False, True])
def test_a_saved_network_comes_back_whole(tmp_path: Path, nested: bool) -> None:
    cfg = ModelConfig(name="small_cnn", weights=str(tmp_path / "model.pt"))
    saved = build_model(cfg.model_copy(update={"weights": "none"}), "binary", 1).state_dict()
    torch.save({"state_dict": saved} if nested else saved, cfg.weights)
    loaded = build_model(cfg, "binary", 2).state_dict()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_an_imagenet_classifier_in_a_file_is_left_out_and_the_random_one_stays(tmp_path: Path) -> None:
    cfg = ModelConfig(name="small_cnn", weights=str(tmp_path / "model.pt"))
    other = build_architecture(ModelConfig(name="small_cnn", in_channels=3), 1000)
    torch.save(other.state_dict(), cfg.weights)
    model = build_model(cfg, "binary", 2)
    random = build_model(cfg.model_copy(update={"weights": "none"}), "binary", 2)
    assert torch.equal(classifier_of(model).weight, classifier_of(random).weight)
    assert torch.equal(model.state_dict()["stages.1.0.weight"], other.state_dict()["stages.1.0.weight"])


@given(
    st.sampled_from([key for key in SMALL.state_dict() if "num_batches" not in key]), st.sampled_from(["drop", "reshape", "add"])
)
@settings(max_examples=25, deadline=None)
def test_what_does_not_fit_is_named(key: str, change: str) -> None:
    state = dict(SMALL.state_dict())
    tensor = state.pop(key)
    if change == "reshape":
        state[key] = torch.zeros(7, *tensor.shape)
    if change == "add":
        state |= {key: tensor, f"{key}_extra": tensor}
    said = {"drop": "1 missing", "reshape": "1 of another shape", "add": "1 unexpected"}[change]
    with pytest.raises(WeightsError, match=f"{said}, the first is {key}"):
        load_state(SMALL, state, "file")


def test_a_classifier_of_other_classes_is_refused() -> None:
    state = build_architecture(ModelConfig(name="small_cnn"), 3).state_dict()
    with pytest.raises(WeightsError, match=r"head.weight \(expected \[2, 128\], got \[3, 128\]\)"):
        load_state(SMALL, state, "file")


@pytest.mark.parametrize(
    "content", [b"", b"not a file of torch", b"PK\x03\x04 a broken zip", pickle.dumps({"weights": 3}, protocol=2)]
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.pt"):
        read_state(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_state(tmp_path / "none.pt")


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state(path)


def test_without_network_the_message_says_what_to_fetch_and_where_to_put_it(hub: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        build_model(ModelConfig(weights="imagenet"), "binary", 0)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(caught.value)
    assert str(hub) in str(caught.value)


def test_a_file_put_into_the_cache_folder_is_found_without_network(hub: Path) -> None:
    zeros = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state_of_torchvision("resnet18").items()}
    torch.save(zeros, hub / "resnet18-f37072fd.pth")
    model = build_model(ModelConfig(weights="imagenet"), "binary", 0)
    assert not model.state_dict()["layer1.0.conv1.weight"].any()
    assert classifier_of(model).weight.any()


def test_a_network_without_imagenet_weights_says_so(hub: Path) -> None:
    with pytest.raises(WeightsError, match="no ImageNet weights for small_cnn"):
        build_model(ModelConfig(name="small_cnn", weights="imagenet"), "binary", 0)
