"""Networks of CT volumes, what a configuration refuses about them, their training and their private gradients."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.choices import VOLUME_NETWORKS
from pneumofed.common.config.experiment import AugmentationConfig, ExperimentConfig, ImageConfig, ModelConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.augment import AugmentationParameters, augment, draw_parameters, normalize, to_model_input
from pneumofed.common.models.build import build_model, classifier_of, set_trainable
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import predict_probabilities
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.common.models.volume_networks import SliceAttention, SliceNetwork
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.client.privacy.test_per_sample_gradients import assert_as_loop
from tests.tiny import tiny_experiment

CPU = build_compute("cpu", "fp32", threads=1)


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_weights(network: nn.Module) -> nn.Module:
    """Attention begins with equal weights, and the classifier's biases with zeros: draws them too."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return network


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        build_config(ExperimentConfig, values, "run")
    return str(refused.value)


def slices(**changes: Any) -> dict[str, Any]:
    return {"image": {"slices": 32, "size_px": 32}, "model": {"name": "resnet18_slices"}} | changes


def test_radiograph_networks_and_volumes_refuse_each_other() -> None:
    assert "takes radiographs" in refusal(image={"slices": 32})
    assert "image.slices is 0" in refusal(model={"name": "resnet18_slices"})
    assert "8 to 128 slices" in refusal(**slices(image={"slices": 7}))
    assert "32 slices at least" in refusal(image={"slices": 16}, model={"name": "densenet121_3d"})
    assert build_config(ExperimentConfig, slices(), "run").image.shape == (32, 32, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "resnet18_slices", "in_channels": 3}}, "in_channels must be 1"),
        ({"model": {"name": "resnet18_slices", "weights": "imagenet"}}, "no ImageNet weights"),
        ({"model": {"name": "densenet121_3d", "weight_standardization": True}}, "two-dimensional"),
        ({"augmentation": {"style": 0.5}}, "Hounsfield"),
        ({"augmentation": {"erase_markers": 0.5}}, "Hounsfield"),
        ({"training": {"early_fraction": 0.5}}, "early_fraction"),
        ({"image": {"slices": 32, "fit": "crop"}}, "fit 'crop'"),
        ({"training": {"micro_batch_size": 4}}, "BatchNorm"),
        ({"training": {"micro_batch_size": 40}, "model": {"name": "resnet18_slices", "norm": "group"}}, "part of a batch"),
    ],
)
def test_what_is_of_radiographs_is_refused_of_volumes(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(**slices(**changes))


def test_radiographs_keys_and_bytes_are_as_before_there_were_volumes() -> None:
    assert ImageConfig().model_dump_json() == '{"size_px":128,"fit":"pad"}'
    assert "micro_batch_size" not in ExperimentConfig().model_dump()["training"]
    assert ExperimentConfig(**slices()).model_dump()["image"]["slices"] == 32


@pytest.mark.parametrize("name", VOLUME_NETWORKS)
def test_logits_of_volumes_have_one_column_a_class(name: Any) -> None:
    with torch.device("meta"):
        network = build_model(ModelConfig(name=name, norm="group"), "three_class", 0)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in network.modules())
    assert not any(getattr(module, "inplace", False) for module in network.modules())
    assert network(torch.empty(2, 1, 32, 40, 40, device="meta")).shape == (2, 3)


def test_a_volume_of_equal_slices_is_seen_as_the_radiograph_network_sees_one() -> None:
    flat = build_model(ModelConfig(), "binary", 3).eval()
    network = draw_weights(build_model(ModelConfig(name="resnet18_slices"), "binary", 3)).eval()
    assert isinstance(network, SliceNetwork)
    network.body.load_state_dict({name: value for name, value in flat.state_dict().items() if not name.startswith("fc.")})
    network.head.load_state_dict(classifier_of(flat).state_dict())
    picture = drawn(2, 1, 1, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(network(picture.expand(2, 1, 9, 48, 48)), flat(picture[:, :, 0]))


def test_attention_begins_as_the_mean_and_then_chooses_slices() -> None:
    attention = SliceAttention(16)
    features = drawn(3 * 5, 16)
    torch.testing.assert_close(attention(features, 5), torch.full((3, 5), 0.2))
    draw_weights(attention)
    weights = attention(features, 5)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert weights.std() > 0.01
    torch.testing.assert_close(attention(features.flip(0), 5), weights.flip(0).flip(1))  # pure in each slice


def test_the_head_sees_the_mean_of_the_weighted_maps() -> None:
    """So that the logit is a sum over the places of the volume, as class activation maps need."""
    network = draw_weights(build_model(ModelConfig(name="resnet18_slices", norm="group"), "binary", 0)).eval()
    assert isinstance(network, SliceNetwork)
    kept: dict[str, torch.Tensor] = {}
    network.weighted.register_forward_hook(lambda _, __, output: kept.update(maps=output))
    network.head.register_forward_pre_hook(lambda _, inputs: kept.update(features=inputs[0]))
    with torch.inference_mode():
        network(drawn(2, 1, 8, 64, 64))
    assert kept["maps"].shape == (2, 512, 8, 2, 2)
    torch.testing.assert_close(kept["features"], kept["maps"].mean(dim=(2, 3, 4)))


def test_without_monai_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets.densenet", None)
    with pytest.raises(ConfigError, match=r"pip install 'pneumofed\[ct\]'"):
        build_model(ModelConfig(name="densenet121_3d"), "binary", 0)


@pytest.mark.parametrize("name", [VOLUME_NETWORKS[0], pytest.param(VOLUME_NETWORKS[1], marks=pytest.mark.slow)])
def test_private_gradients_of_volumes_are_as_a_loop_over_units(name: Any) -> None:
    """The slow oracle is autograd, one unit at a time; of `resnet18_slices` a layer sees the slices of each unit one by one."""
    network = draw_weights(build_model(ModelConfig(name=name, norm="group"), "binary", 0)).eval()
    count = 32 if name == "densenet121_3d" else 8
    assert_as_loop(network, drawn(4, 1, count, 32, 32), views=2, units=2)


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_private_gradients_of_a_volume_beside_clinical_values_are_as_a_loop_over_units(fusion: str) -> None:
    """Slices come one by one, values once: both are of the same unit."""
    columns = [{"name": "age", "low": 0.0, "high": 120.0}, {"name": "cough", "kind": "binary"}]
    experiment = build_config(
        ExperimentConfig,
        slices(model={"name": "resnet18_slices", "norm": "group"}, clinical={"columns": columns, "fusion": fusion}),
    )
    network = draw_weights(build_model(experiment.model, "binary", 0)).eval()
    assert isinstance(network, ClinicalNetwork)
    with network.giving(torch.tensor([[70.0, float("nan")]])):
        assert_as_loop(network, drawn(4, 1, 8, 32, 32), views=2, units=2)


def test_a_convolution_of_volumes_has_a_rule_of_its_own() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2)),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv3d(4, 6, 3, groups=2),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 1),
    )
    assert_as_loop(network, drawn(6, 1, 6, 9, 7), views=2)


def volumes(count: int, shape: tuple[int, int, int] = (8, 32, 32)) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 255, (count, *shape)).astype(np.uint8)
    names = tuple(map(str, range(count)))
    return Dataset(pixels, (np.arange(count) % 2).astype(np.int64), names, names, DataReport())


def trained(micro_batch_size: int) -> np.ndarray:
    changes: dict[str, Any] = {
        "image": {"slices": 8, "size_px": 32},
        "model": {"name": "resnet18_slices", "norm": "group"},
        "augmentation": dict.fromkeys(AugmentationConfig.model_fields, 0.0),  # views are drawn lot by lot
        "training": {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "batch_size": 6,
            "local_epochs": 1,
            "micro_batch_size": micro_batch_size,
        },
    }
    experiment = tiny_experiment(**changes)
    network = build_model(experiment.model, experiment.task, seed=1)
    plan = RoundPlan(experiment, 1, "site")
    train_locally(build_setup(network, [3, 3], plan, CPU), volumes(6), plan)
    return ArraysLayout.of(network).flatten(network)[0]


def test_a_batch_in_lots_takes_the_step_of_the_whole_batch() -> None:
    first = build_model(ModelConfig(name="resnet18_slices", norm="group"), "binary", 1)
    before, whole, lots, other = ArraysLayout.of(first).flatten(first)[0], trained(0), trained(4), trained(1)
    step = np.linalg.norm(whole - before)
    assert step > 1e-4
    assert np.linalg.norm(lots - whole) < 1e-3 * step
    assert np.linalg.norm(other - whole) < 1e-3 * step


def test_three_dimensional_convolutions_train_in_float32_on_a_cpu_whatever_the_others_do() -> None:
    half = Compute(torch.device("cpu"), torch.bfloat16)
    experiment = tiny_experiment(image={"slices": 32}, model={"name": "densenet121_3d"})
    network = build_model(experiment.model, experiment.task, 0)
    assert build_setup(network, [1, 1], RoundPlan(experiment, 1, "site"), half).compute.dtype is None
    assert half.suited_to(build_model(ModelConfig(name="resnet18_slices"), "binary", 0)) == half


def test_probabilities_do_not_depend_on_how_many_volumes_run_together() -> None:
    network = build_model(ModelConfig(name="resnet18_slices"), "binary", 0)
    found = [predict_probabilities(network, volumes(3), CPU, 1, batch_size) for batch_size in (1, 64)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("freeze", ["head_only", "last_block"])
def test_volume_networks_freeze_in_part(freeze: Any) -> None:
    for name in VOLUME_NETWORKS:
        with torch.device("meta"):
            network = build_model(ModelConfig(name=name), "binary", 0)
        names = set_trainable(network, freeze)
        assert any(name.startswith(("head.", "class_layers.out.")) for name in names)
        assert (len(names) > 2) == (freeze == "last_block")


def still(count: int, **changes: Any) -> AugmentationParameters:
    """Parameters that change nothing, but for `changes`."""
    off = AugmentationConfig(**dict.fromkeys(AugmentationConfig.model_fields, 0.0))
    parameters = draw_parameters(count, off, torch.Generator().manual_seed(0))
    for name, value in changes.items():
        object.__setattr__(parameters, name, value)
    return parameters


def test_a_volume_that_nothing_changes_comes_back_bit_for_bit() -> None:
    volume = to_model_input(volumes(2).pixels)
    assert volume.shape == (2, 1, 8, 32, 32)
    assert torch.equal(augment(volume, still(2)), volume)
    assert normalize(volume, 1).shape == volume.shape


def test_each_slice_moves_in_its_plane_as_an_image_does() -> None:
    volume = to_model_input(volumes(2).pixels)
    moved = {"angle_rad": torch.tensor([0.2, -0.1]), "shift": torch.tensor([[0.1, 0.0], [0.0, -0.2]])}
    found = augment(volume, still(2, **moved))
    for number in range(8):
        torch.testing.assert_close(found[:, :, number], augment(volume[:, :, number], still(2, **moved)))


def test_along_the_axis_a_volume_moves_and_stretches_about_its_middle() -> None:
    volume = to_model_input(volumes(1).pixels)
    moved = augment(volume, still(1, axis_shift=torch.tensor([0.25])))
    torch.testing.assert_close(moved[:, :, 2:], volume[:, :, :-2])
    assert not moved[:, :, :2].any()
    ramp = torch.linspace(0.1, 0.8, 8).view(1, 1, 8, 1, 1).expand(1, 1, 8, 33, 33).contiguous()
    stretched = augment(ramp, still(1, scale=torch.tensor([2.0])))[0, 0, :, 16, 16]
    torch.testing.assert_close(stretched, (ramp[0, 0, :, 16, 16] - 0.45) / 2 + 0.45)


def test_volumes_are_augmented_alike_for_the_same_seed_and_not_for_another() -> None:
    volume, cfg = to_model_input(volumes(2).pixels), AugmentationConfig()
    views = [augment(volume, draw_parameters(2, cfg, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
