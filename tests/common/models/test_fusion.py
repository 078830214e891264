"""Networks with clinical values: the image's part is the network of the list, and a missing value is missing and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pneumofed.client.privacy.per_sample_gradients import ClippedGradients
from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.models.build import build_model, load_state, set_trainable, train_mode
from pneumofed.common.models.fusion import ClinicalNetwork, with_standardization
from pneumofed.common.wire.parameter_layout import ArraysLayout

COLUMNS = [
    {"name": "temperature", "unit": "°C", "low": 34, "high": 43},
    {"name": "symptoms", "kind": "codes", "codes": ["fever", "cough"]},
    {"name": "smoker", "kind": "binary"},
]
NAN = float("nan")
VALUES = torch.tensor([[38.5, 1, 0, 1], [NAN, 0, 1, 0], [36.0, NAN, NAN, NAN]])


def model_config(fusion: str, **model: Any) -> ModelConfig:
    clinical = {"columns": COLUMNS, "fusion": fusion}
    return build_config(ExperimentConfig, {"model": {"name": "small_cnn", **model}, "clinical": clinical}).model


def fused(fusion: str, **model: Any) -> ClinicalNetwork:
    network = build_model(model_config(fusion, **model), "binary", seed=0)
    assert isinstance(network, ClinicalNetwork)
    return network


def moved(network: ClinicalNetwork) -> ClinicalNetwork:
    """With weights that are not the first ones, so that FiLM does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
@pytest.mark.parametrize("name", ["small_cnn", "scattering", "efficientnet_b0"])
def test_the_images_part_is_the_network_of_the_list(fusion: str, name: ModelName) -> None:
    network, plain = fused(fusion, name=name), build_model(ModelConfig(name=name), "binary", seed=0)
    for key, tensor in network.image.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key])
    again = build_model(model_config(fusion, name=name), "binary", seed=5)
    load_state(again, plain.state_dict(), "the list's weights")
    for key, tensor in again.state_dict().items():
        if key.startswith("image."):
            assert torch.equal(tensor, plain.state_dict()[key.removeprefix("image.")])


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_without_values_the_answer_is_that_of_all_missing(fusion: str) -> None:
    network = moved(fused(fusion)).eval()
    torch.testing.assert_close(network(images()), network(images(), torch.full((3, 4), NAN)), rtol=0, atol=0)
    assert not torch.equal(network(images()), network(images(), VALUES))
    with network.giving(VALUES[:1]):
        torch.testing.assert_close(network(images()), network(images(), VALUES[:1].expand(3, -1)), rtol=0, atol=0)
    assert network.given is None


def test_film_is_its_formula_and_begins_as_the_image_only() -> None:
    network = fused("film")
    torch.testing.assert_close(network.eval()(images(), VALUES), network(images()))
    fusion, features = moved(network).fusion, torch.randn(3, 128)
    assert fusion.modulate is not None
    by_hand = []
    for row, values in zip(features, VALUES, strict=True):
        known = [0.0 if v.isnan() else float((v - m) / d) for v, m, d in zip(values, fusion.mean, fusion.deviation, strict=True)]
        hidden = torch.tanh(fusion.reader(torch.tensor([*known, *values.isnan().float().tolist()])))
        scale, shift = fusion.modulate(hidden).split(128)
        by_hand.append((1 + scale) * row + shift)
    torch.testing.assert_close(fusion(features, VALUES), torch.stack(by_hand))


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_a_row_is_the_same_beside_other_rows(fusion: str) -> None:
    network = moved(fused(fusion, norm="group")).train()
    together = network(images(), VALUES)
    alone = torch.cat([network(images()[row : row + 1], VALUES[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
@pytest.mark.parametrize("freeze", ["none", "head_only"])
def test_the_joint_gradient_of_each_image_is_clipped(fusion: str, freeze: Any) -> None:
    network = moved(fused(fusion, norm="group"))
    set_trainable(network, freeze)
    train_mode(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    labels = torch.tensor([0, 1, 1])

    def losses(rows: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(network(images()[rows], VALUES[rows]), labels[rows], reduction="sum")

    single = [torch.autograd.grad(losses(slice(row, row + 1)), trained) for row in range(3)]
    lengths = [float(torch.cat([one.ravel() for one in gradient]).norm()) for gradient in single]
    bound = sorted(lengths)[1]  # clips one, leaves one, and meets one
    expected = [
        sum(min(1.0, bound / length) * gradient[number] for gradient, length in zip(single, lengths, strict=True))
        for number in range(len(trained))
    ]
    ClippedGradients(network, bound).add(lambda: losses(slice(0, 3)))
    for parameter, wanted in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=2e-3, atol=1e-5)


def test_what_reads_values_is_trained_with_the_classifier() -> None:
    network = fused("film")
    assert {name.partition(".")[0] for name in set_trainable(network, "head_only")} == {"fusion", "head"}
    train_mode(network)
    assert not network.image.training and network.fusion.training and network.head.training
    last = set_trainable(network, "last_block")
    assert any(name.startswith("image.stages.3") for name in last) and not any(name.startswith("image.stages.0") for name in last)


def test_ranges_standardise_without_data_and_stated_numbers_win() -> None:
    network = fused("concatenate")
    assert network.fusion.mean.tolist() == [38.5, 0.5, 0.5, 0.5] and network.fusion.deviation.tolist() == [4.5, 0.5, 0.5, 0.5]
    schema = model_config("concatenate").clinical
    assert schema is not None
    column = schema.columns[0].model_copy(update={"mean": 37.0, "deviation": 0.5})
    network.fusion.restate(schema.model_copy(update={"columns": (column, *schema.columns[1:])}))
    assert with_standardization(schema, network).columns[0] == column
    layout = ArraysLayout.of(network)
    fixed = layout.flatten(network)[1][layout.fixed_statistics]
    assert sorted(fixed.tolist()) == sorted([37.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert not len(ArraysLayout.of(build_model(ModelConfig(name="small_cnn"), "binary", 0)).fixed_statistics)
