"""Networks: in-place freedom, seeds, norms, per-sample gradients and freezing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pneumofed.common.config.choices import IMAGENET_PACKAGE, ModelName, NetworkName
from pneumofed.common.config.classes import LabelTask
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.models.architectures import build_architecture
from pneumofed.common.models.build import (
    _NoDraws,
    build_empty,
    build_model,
    classifier_of,
    freeze_in_round,
    set_trainable,
    train_mode,
)
from pneumofed.common.models.layers import StandardizedConv2d, group_count

NAMES: tuple[ModelName, ...] = get_args(ModelName)

GRADIENTS = "grad_sample"
"""Where Opacus leaves the per-sample gradients of a parameter."""

quick = settings(max_examples=25, deadline=None)


def build_unfilled(name: ModelName, **values: Any) -> nn.Module:
    """A network without memory for its weights: enough for names and shapes, and quick to have."""
    with torch.device("meta"):
        return build_model(ModelConfig(name=name, **values), "binary", 0)


def input_of(model_cfg: ModelConfig, images: int, size_px: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(images, model_cfg.in_channels, size_px, size_px, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_works_in_place(name: ModelName) -> None:
    """Torch refuses an in-place change of what a full backward hook has wrapped, and Opacus hooks every layer in this way."""
    model = build_unfilled(name)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    model(torch.empty(2, 1, 32, 32, device="meta", requires_grad=True))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of them, also what no state dict has."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


LARGE = ("vgg16", "resnet34", "resnet50", "densenet121")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(pytest.param(name, {}, marks=pytest.mark.slow if name in LARGE else ()) for name in get_args(NetworkName)),
        ("resnet18", {"norm": "group", "weight_standardization": True}),
        ("small_cnn", {"in_channels": 3}),
    ],
)
def test_an_empty_network_draws_nothing_and_with_weights_is_the_network(name: NetworkName, values: dict[str, Any]) -> None:
    cfg = ModelConfig(name=name, **values)
    drawn, before = build_model(cfg, "binary", 3), torch.get_rng_state()
    with _NoDraws():
        build_architecture(cfg, 2)
    assert torch.equal(torch.get_rng_state(), before)
    empty = build_empty(cfg, "binary")
    empty.load_state_dict(drawn.state_dict())
    expected = tensors_of(drawn)
    assert expected.keys() == tensors_of(empty).keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors_of(empty).items())


def test_another_thread_draws_while_an_empty_network_is_built() -> None:
    with ThreadPoolExecutor(1) as other, _NoDraws():
        assert nn.init.normal_(torch.zeros(5)).abs().sum() == 0
        assert other.submit(lambda: nn.init.normal_(torch.zeros(5))).result().abs().sum() > 0


@pytest.mark.parametrize(("in_channels", "task", "classes"), [(1, "binary", 2), (3, "three_class", 3)])
@pytest.mark.parametrize("size_px", [32, 65])
def test_logits_have_one_column_a_class(in_channels: Any, task: LabelTask, classes: int, size_px: int) -> None:
    for name in ("resnet18", "vgg16", "small_cnn"):
        with torch.device("meta"):
            model = build_model(ModelConfig(name=name, in_channels=in_channels), task, 0)
        assert model(torch.empty(2, in_channels, size_px, size_px, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_batch_can_be_learnt_by_heart(norm: Any) -> None:
    cfg = ModelConfig(name="small_cnn", norm=norm)
    model, labels = build_model(cfg, "binary", 0), torch.tensor([0, 1, 0, 1, 1, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss_of(model, input_of(cfg, 6), labels).backward()
        optimizer.step()
    assert torch.equal(model(input_of(cfg, 6)).argmax(dim=1), labels)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "small_cnn"])
def test_weights_are_pure_in_the_seed_and_leave_the_global_generator_alone(name: ModelName) -> None:
    cfg = ModelConfig(name=name)
    state = torch.get_rng_state()
    first = build_model(cfg, "binary", 3).state_dict()
    torch.rand(5)
    before = torch.get_rng_state()
    again, other = build_model(cfg, "binary", 3).state_dict(), build_model(cfg, "binary", 4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    torch.set_rng_state(state)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in get_args(ModelName) if name != "scattering"])
def test_first_convolutions_are_drawn_as_he_et_al_2015_say(name: ModelName, in_channels: Any) -> None:
    """Eq. 10: a variance of 2 / fan, by fan-out as torchvision does, DenseNet's by fan-in, and of a depthwise filter alone in
    EfficientNet-Lite's; the stem of one channel too."""
    model = build_model(ModelConfig(name=name, in_channels=in_channels), "binary", 7)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            fan = weight[0].numel() if name == "densenet121" else weight[:, 0].numel()
            fan //= module.groups if name in IMAGENET_PACKAGE else 1
            error = (2 / weight.numel()) ** 0.5  # relative standard error of a variance of so many normal draws
            assert weight.var(correction=0) * fan / 2 == pytest.approx(1.0, abs=6 * error)


@quick
@given(st.integers(1, 4096))
def test_groups_divide_the_channels_and_none_larger_up_to_32_does(channels: int) -> None:
    groups = group_count(channels)
    assert channels % groups == 0
    assert not any(channels % larger == 0 for larger in range(groups + 1, 33))


@pytest.mark.parametrize("name", NAMES)
def test_group_norm_stands_where_batch_norm_stood(name: ModelName) -> None:
    batch, group = build_unfilled(name), build_unfilled(name, norm="group")
    places = {path: module.num_features for path, module in batch.named_modules() if isinstance(module, _BatchNorm)}
    assert {path: module.num_channels for path, module in group.named_modules() if isinstance(module, nn.GroupNorm)} == places
    assert [key for key, _ in group.named_parameters()] == [key for key, _ in batch.named_parameters()]


def test_standardised_filters_have_no_mean_and_unit_length_and_give_unit_variance() -> None:
    torch.manual_seed(0)
    layer = StandardizedConv2d(64, 32, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.mul_(7.0).add_(3.0)
    images = torch.randn(4, 64, 16, 16)
    assert layer(torch.ones(1, 64, 9, 9))[..., 1:-1, 1:-1].abs().max() < 1e-3
    assert layer(images).var().item() == pytest.approx(1.0, rel=0.1)


def test_weight_standardisation_stands_in_every_convolution_and_keeps_the_weights() -> None:
    plain, standardised = (
        build_model(ModelConfig(name="small_cnn", norm="group", weight_standardization=on), "binary", 0) for on in (False, True)
    )
    assert all(isinstance(module, StandardizedConv2d) for module in standardised.modules() if isinstance(module, nn.Conv2d))
    assert not any(isinstance(module, StandardizedConv2d) for module in plain.modules())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), standardised.state_dict().values(), strict=True))


def test_the_length_of_a_standardised_filter_does_not_matter() -> None:
    cfg = ModelConfig(name="small_cnn", norm="group", weight_standardization=True)
    model = build_model(cfg, "binary", 0)
    before = model(input_of(cfg, 2))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(5.0)
    torch.testing.assert_close(model(input_of(cfg, 2)), before, rtol=1e-2, atol=1e-3)


def test_per_sample_gradients_of_opacus_equal_a_loop_over_samples() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    cfg = ModelConfig(norm="group")
    images, labels = input_of(cfg, 3, 64), torch.tensor([0, 1, 1])
    model = build_model(cfg, "binary", 0)
    slow = [torch.autograd.grad(loss_of(model, images[i : i + 1], labels[i : i + 1]), list(model.parameters())) for i in range(3)]
    wrapped = grad_sample.GradSampleModule(model, loss_reduction="sum")
    loss_of(wrapped, images, labels).backward()
    for number, parameter in enumerate(model.parameters()):
        expected = torch.stack([sample[number] for sample in slow])
        error = (getattr(parameter, GRADIENTS) - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-4


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images), labels, reduction="sum")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "scattering"])
def test_each_freeze_policy_trains_more_than_the_one_before(name: ModelName) -> None:
    model = build_unfilled(name)
    everything = tuple(key for key, _ in model.named_parameters())
    head, block, none = (set_trainable(model, freeze) for freeze in ("head_only", "last_block", "none"))
    assert none == everything
    assert set(head) < set(block) < set(none)
    assert {parameter.shape for key, parameter in model.named_parameters() if key in head} == {
        parameter.shape for parameter in classifier_of(model).parameters()
    }
    assert all(key.split(".")[:-1] == head[0].split(".")[:-1] for key in head)


@pytest.mark.parametrize("freeze", ["head_only", "last_block", "none"])
def test_what_is_frozen_does_not_move_and_what_is_not_does(freeze: Any) -> None:
    cfg = ModelConfig(name="small_cnn")
    model = build_model(cfg, "binary", 0)
    trainable = set_trainable(model, freeze)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_mode(model)
    nn.functional.cross_entropy(model(input_of(cfg, 4)), torch.tensor([0, 1, 1, 1])).backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    owners = {key.rpartition(".")[0] for key in trainable}
    assert moved == {key for key in before if key.rpartition(".")[0] in owners}


def test_train_mode_thaws_what_was_frozen_before() -> None:
    model = build_model(ModelConfig(name="small_cnn"), "binary", 0)
    set_trainable(model, "head_only")
    train_mode(model)
    assert not any(module.training for module in model.modules() if isinstance(module, _BatchNorm))
    set_trainable(model, "none")
    train_mode(model)
    assert all(module.training for module in model.modules())


def test_a_network_of_another_maker_is_refused() -> None:
    with pytest.raises(TypeError, match="build_model"):
        set_trainable(nn.Linear(2, 2), "head_only")


@quick
@given(st.integers(0, 5), st.integers(1, 10), st.sampled_from(["none", "head_only", "last_block"]))
def test_head_first_rounds_come_first_and_alone(head_rounds: int, number: int, freeze: Any) -> None:
    cfg = ModelConfig(head_first_rounds=head_rounds, freeze=freeze, fine_tune_factor=0.25)
    expected = ("head_only", 1.0) if number <= head_rounds else (freeze, 0.25 if head_rounds else 1.0)
    assert freeze_in_round(cfg, number) == expected
