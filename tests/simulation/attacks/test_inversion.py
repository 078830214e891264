"""Inversion where the answer is known, and what each protection leaves of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pneumofed.client.federation.training import RoundPlan, build_setup, train_locally
from pneumofed.common.config.experiment import LossConfig, ModelConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD, to_model_input
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.recipe import build_loss
from pneumofed.simulation.attacks.inversion import (
    InversionSettings,
    Target,
    correlations,
    cosine_distance,
    infer_label,
    masked_view,
    private_view,
    psnr,
    ranks,
    reconstruct,
    total_variation,
)
from pneumofed.simulation.attacks.inversion_bench import target_of
from tests.tiny import tiny_experiment

LOSS = build_loss(LossConfig(label_smoothing=0.0, logit_adjustment=False), [1, 1])


def _linear(size_px: int = 8) -> Target:
    torch.manual_seed(0)
    return Target(nn.Sequential(nn.Flatten(), nn.Linear(size_px**2, 2)), LOSS, size_px)


def _small(seed: int = 0) -> Target:
    return Target(build_model(ModelConfig(name="small_cnn", norm="group"), "binary", seed).eval(), LOSS, 32)


def _blobs(count: int, size_px: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images, float32 [count, 1, S, S] in [0, 1]."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(size_px, size_px), mode="bicubic", align_corners=True).clamp(0.0, 1.0)


def test_a_linear_layer_tells_its_input_exactly() -> None:
    """Of W x + b the gradients are g x^T and g: one divided by the other is the image (Geiping et al. 2020, proposition 3.1)."""
    target, image, label = _linear(), _blobs(1, 8), torch.tensor([1])
    weight, bias = target.gradients(image, label)
    exact = (weight[0] / bias[0]).view(8, 8) * GREY_STD + GREY_MEAN
    assert torch.allclose(exact, image[0, 0], atol=1e-4)
    settings = InversionSettings(iterations=800, restarts=1, total_variation=0.0)
    found = reconstruct(target, target.gradients(image, label), label, settings, seed=1)
    assert psnr(found[0, 0].double().numpy(), image[0, 0].double().numpy()) > 30.0


def test_restarts_keep_the_best_and_repeat_bit_for_bit() -> None:
    target, image, label = _linear(), _blobs(1, 8), torch.tensor([0])
    observed = target.gradients(image, label)
    short = InversionSettings(iterations=20, restarts=3, total_variation=0.0)
    first, again = (reconstruct(target, observed, label, short, seed=5) for _ in range(2))
    assert torch.equal(first, again)
    one = reconstruct(target, observed, label, InversionSettings(iterations=20, restarts=1, total_variation=0.0), seed=5)
    distances = [float(cosine_distance(target.gradients(found, label), observed)) for found in (first, one)]
    assert distances[0] <= distances[1] + 1e-7


def test_the_gradient_is_what_a_hospital_s_step_sends() -> None:
    """One SGD step of the hospital's own loop moves the weights by minus the learning rate times `Target.gradients`."""
    experiment = tiny_experiment(
        rounds=1,
        model={"name": "small_cnn", "norm": "group"},
        training={
            "optimizer": "sgd",
            "learning_rate": 0.5,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "schedule": "constant",
            "batch_size": 4,
        },
        augmentation=dict.fromkeys(
            ("rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast", "noise_std"), 0.0
        ),
        loss={"label_smoothing": 0.0, "logit_adjustment": False},
    )
    pixels = (_blobs(4, 32)[:, 0] * 255).round().to(torch.uint8).numpy()
    data = Dataset(pixels, np.array([0, 1, 1, 0]), tuple("abcd"), tuple("abcd"), DataReport())
    model, target = build_model(experiment.model, "binary", 0), _small()
    plan = RoundPlan(experiment, 1, "site")
    train_locally(build_setup(model, [2, 2], plan, build_compute("cpu", "fp32", 1)), data, plan)
    expected = target.gradients(to_model_input(pixels), torch.from_numpy(data.labels))
    for before, after, gradient in zip(target.model.parameters(), model.parameters(), expected, strict=True):
        assert torch.allclose((before - after) / 0.5, gradient, atol=2e-5)


def test_the_label_of_one_image_is_read_from_the_last_bias() -> None:
    target, images = _small(), _blobs(6, 32)
    for number in range(6):
        label = torch.tensor([number % 2])
        assert infer_label(target, target.gradients(images[number : number + 1], label)) == number % 2


def test_clipping_alone_keeps_the_direction_and_bounds_the_length() -> None:
    target, image, label = _small(), _blobs(1, 32), torch.tensor([1])
    plain, clipped = target.gradients(image, label), private_view(target, image, label, (0.01, 0.0), seed=0)
    assert float(cosine_distance(plain, clipped)) < 1e-5
    assert float(torch.cat([part.flatten() for part in clipped]).norm()) <= 0.01 * (1 + 1e-4)


def test_private_noise_has_the_deviation_that_was_asked_for() -> None:
    target, image, label = _small(), _blobs(1, 32), torch.tensor([1])
    still, noisy = (private_view(target, image, label, (0.5, noise), seed=3) for noise in (0.0, 2.0))
    difference = torch.cat([(a - b).flatten() for a, b in zip(noisy, still, strict=True)])
    assert float(difference.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float(difference.mean())) < 5.0 / len(difference) ** 0.5


def test_a_masked_update_is_uniform_whatever_the_update_was() -> None:
    shape = [torch.zeros(20_000), torch.full((20_000,), 0.7)]
    masked = torch.cat(masked_view(shape, seed=0)).double().numpy()
    for part in (masked[:20_000], masked[20_000:]):
        assert stats.kstest(part / 2.0**16 + 0.5, "uniform").pvalue > 1e-3


def test_total_variation_counts_steps_between_neighbours() -> None:
    image = torch.zeros(1, 1, 4, 4)
    assert float(total_variation(image)) == 0.0
    image[..., 2:] = 1.0
    assert float(total_variation(image)) == pytest.approx(4 / 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plain_update_shows_the_image_and_one_under_dp_does_not() -> None:
    """The bench's own claim at a small size: epsilon 3 of some hundred patients takes a noise multiplier of about 1."""
    target = target_of(tiny_experiment(model={"name": "small_cnn", "norm": "batch"}, loss={"logit_adjustment": False}))
    images, labels = _blobs(40, 32, seed=4), torch.arange(40) % 2
    settings = InversionSettings(iterations=600)
    places: dict[str, list[int]] = {"plain": [], "private": []}
    likeness: dict[str, list[float]] = {"plain": [], "private": []}
    for number in range(3):
        image, label = images[number : number + 1], labels[number : number + 1]
        views = {"plain": target.gradients(image, label), "private": private_view(target, image, label, (1.0, 1.0), seed=number)}
        for name, observed in views.items():
            found = reconstruct(target, observed, label, settings, seed=number)
            alike = correlations(found[:, 0].double().numpy(), images[:, 0].double().numpy())
            places[name].append(int(ranks(alike, np.array([number]))[0]))
            likeness[name].append(float(alike[0, number]))
    assert places["plain"].count(1) >= 2
    assert np.mean(likeness["plain"]) > 0.8
    assert places["private"].count(1) <= 1
    assert np.mean(likeness["private"]) < 0.3
