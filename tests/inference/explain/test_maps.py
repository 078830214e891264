"""Every method on every kind of network: shape, determinism, and agreement with formulas that can be worked out."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models.architectures import build_architecture
from pneumofed.common.models.build import build_model, classifier_of
from pneumofed.common.seeds import torch_generator
from pneumofed.inference.explain.attribution import compute_attribution, empty, superpixels
from pneumofed.inference.explain.cam import (
    LogOdds,
    at_size,
    enlarge,
    grad_cam,
    grad_cam_plus_plus,
    larger_side,
    log_odds,
    target_layer,
    target_mask,
)
from pneumofed.inference.explain.focus import quick_map
from pneumofed.inference.explain.methods import METHODS, Method, choose_detail

IMAGE = torch.rand(1, 1, 32, 32, generator=torch_generator("explained image"))
AVERAGED = [name for name in get_args(ModelName) if name not in ("scattering", "imagenet_wavelets")]


def network_of(name: ModelName, task: str = "binary", seed: int = 0) -> nn.Module:
    return build_model(ModelConfig(name=name, scattering_scale=2), task, seed).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_a_map_has_the_image_s_shape_and_comes_again_with_its_seed(method: Method) -> None:
    network, before = network_of("small_cnn"), torch.get_rng_state()
    first, again = (compute_attribution(network, IMAGE, method, seed=3) for _ in range(2))
    assert first.values.shape == (32, 32) and first.values.dtype == np.float32 and np.isfinite(first.values).all()
    assert any(np.ptp(compute_attribution(network, IMAGE, method, target).values) > 0 for target in (0, 1))
    np.testing.assert_array_equal(first.values, again.values)
    assert torch.equal(before, torch.get_rng_state())
    with torch.inference_mode():
        logits = network(normalize(IMAGE, 1))[0].double()
    assert first.score == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)


@pytest.mark.parametrize("method", ["gradient-shap", "kernel-shap"])
def test_another_seed_draws_otherwise(method: Method) -> None:
    network = network_of("small_cnn")
    assert np.any(
        compute_attribution(network, IMAGE, method, seed=0).values != compute_attribution(network, IMAGE, method, seed=1).values
    )


@pytest.mark.parametrize("name", ["scattering", "imagenet_wavelets"])
def test_grad_cam_has_maps_to_weigh_where_none_are_averaged(name: ModelName) -> None:
    for maker in (grad_cam, grad_cam_plus_plus):
        values = maker(LogOdds(network_of(name), "pneumonia"), IMAGE)
        assert values.ndim == 2 and bool((values >= 0).all())


@pytest.mark.parametrize(("name", "task"), [(name, "binary") for name in AVERAGED] + [("small_cnn", "three_class")])
def test_the_quick_map_is_grad_cam_up_to_a_factor(name: ModelName, task: str) -> None:
    network = network_of(name, task)
    image = torch.rand(1, 1, 64, 64, generator=torch_generator("larger"))
    kept: list[torch.Tensor] = []
    handle = target_layer(network).register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.inference_mode():
        logits = network(normalize(image, 1))
    handle.remove()
    weight = classifier_of(network).weight.detach()
    slope = torch.softmax(logits[0, 1:], 0) @ weight[1:] - weight[0]
    cam = torch.tensordot(slope, kept[0][0], dims=1).numpy()
    slow = compute_attribution(network, image, "grad-cam").values
    quick = quick_map(cam, 0.0, 64).values
    np.testing.assert_allclose(quick, slow * cam.size, atol=1e-4 * max(1e-3, float(np.abs(quick).max())))


@pytest.mark.parametrize("name", AVERAGED)
def test_a_finer_layer_has_twice_the_cells_and_a_larger_input_more(name: ModelName) -> None:
    network, image = network_of(name), torch.rand(1, 1, 64, 64, generator=torch_generator("larger"))
    last = compute_attribution(network, image, "grad-cam")
    finer = compute_attribution(network, image, "grad-cam", detail="finer-layer")
    larger = compute_attribution(network, image, "grad-cam", detail="larger-input")
    assert finer.cell_px == last.cell_px / 2
    assert larger.cell_px < last.cell_px and larger.values.shape == finer.values.shape == (64, 64)


def test_a_map_of_several_sizes_is_the_mean_of_theirs_and_as_coarse_as_their_cells() -> None:
    network, larger = network_of("small_cnn"), torch.rand(1, 1, 112, 112, generator=torch_generator("larger"))
    image, score = at_size(larger, 64), LogOdds(network, 0)
    found = compute_attribution(network, image, "grad-cam", 0, detail="several-sizes", larger=larger)
    inputs = [image, *(at_size(larger, side) for side in (80, 96, 112))]
    maps = [grad_cam(score, one) for one in inputs]
    expected = np.mean([enlarge(one / one.max(), 64).numpy() for one in maps], axis=0)
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    assert found.cell_px == pytest.approx(np.mean([64 / 4, 64 / 5, 64 / 6, 64 / 7]))
    assert larger_side(64) == 112


def test_a_detail_is_refused_where_nothing_has_it() -> None:
    with pytest.raises(ConfigError, match="--detail finer-layer: only grad-cam and grad-cam"):
        choose_detail("finer-layer", ("lime",), "--detail")
    with pytest.raises(ConfigError, match="no finer layer"):
        compute_attribution(network_of("scattering"), IMAGE, "grad-cam", detail="finer-layer")
    with pytest.raises(ConfigError, match="expected one of last-layer"):
        choose_detail("fine", ("grad-cam",), "--detail")


def test_grad_cam_plus_plus_is_its_formula_on_averaged_maps() -> None:
    """There g is v_k / (h w) everywhere, so alpha = 1 / (2 + g sum(A)) and w_k = h w ReLU(g) alpha."""
    network = network_of("small_cnn")
    maps = network.stages(normalize(IMAGE, 1)).detach()[0]  # type: ignore[operator]
    weight = classifier_of(network).weight.detach()
    gradient = ((weight[1] - weight[0]) / maps[0].numel()).clamp_min(0)
    weights = maps[0].numel() * gradient / (2 + gradient * maps.sum(dim=(1, 2)))
    expected = torch.relu(torch.tensordot(weights, maps, dims=1))
    torch.testing.assert_close(grad_cam_plus_plus(LogOdds(network, "pneumonia"), IMAGE), expected)


class Bright(nn.Module):
    """Logit 1 is the sum of the image's left half, whatever its right half holds."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["architecture"] = vars(build_architecture(ModelConfig(name="scattering", scattering_scale=2), 2))[
            "architecture"
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x[..., : x.shape[-1] // 2].sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(found), found], dim=1)


@pytest.mark.parametrize("method", ["integrated-gradients", "kernel-shap"])
def test_shares_of_a_linear_score_add_up_and_lie_where_it_looks(method: Method) -> None:
    score = LogOdds(Bright(), "pneumonia")
    values = compute_attribution(score.network, IMAGE, method).values
    difference = float(score(IMAGE) - score(empty(IMAGE)))
    assert values.sum() == pytest.approx(difference, rel=0.05, abs=0.05)
    if method == "integrated-gradients":
        assert np.abs(values[:, 16:]).max() == 0


@pytest.mark.parametrize("method", ["occlusion", "lime"])
def test_a_bright_spot_in_the_half_that_counts_is_found(method: Method) -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:12, 4:8] = image[..., 8:12, 24:28] = 1.0
    values = compute_attribution(Bright(), image, method).values
    assert values[8:12, 4:8].mean() > 5 * abs(values[8:12, 24:28].mean())


def test_evidence_for_normal_is_evidence_against_pneumonia() -> None:
    logits = torch.randn(4, 3, generator=torch_generator("logits"))
    torch.testing.assert_close(log_odds(logits, 0), -log_odds(logits, "pneumonia"))
    torch.testing.assert_close(torch.sigmoid(log_odds(logits, 2)), torch.softmax(logits, 1)[:, 2])
    with pytest.raises(ValueError, match="target"):
        target_mask(2, 2)


def test_superpixels_follow_borders_and_cover_the_image() -> None:
    pixels = np.zeros((64, 64), np.float32)
    pixels[:, 29:] = 1.0
    found = superpixels(pixels, 16)
    assert set(np.unique(found)) == set(range(found.max() + 1)) and found.max() < 16
    assert not set(np.unique(found[:, :29])) & set(np.unique(found[:, 29:]))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image"):
        compute_attribution(network_of("small_cnn"), IMAGE[0], "grad-cam")


def test_enlarging_keeps_the_range() -> None:
    values = enlarge(torch.rand(4, 4), 32)
    assert values.shape == (32, 32) and values.min() >= 0 and values.max() <= 1
