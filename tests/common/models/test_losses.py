"""Losses against torch's cross-entropy and the papers' formulas; class weights as properties."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.config.experiment import LossConfig
from pneumofed.common.errors import EmptySiteError
from pneumofed.common.models.recipe import EFFECTIVE_NUMBER_BETA, WeightedLoss, build_loss, class_weights

PLAIN = {"class_weights": "balanced", "logit_adjustment": False, "label_smoothing": 0.0}


def plain(**changes: Any) -> LossConfig:
    """Class weights alone, without what else the defaults add."""
    return LossConfig(**{**PLAIN, **changes})


COUNTS = st.lists(st.integers(0, 5000), min_size=2, max_size=4).filter(sum)
quick = settings(max_examples=25, deadline=None)
RULES = st.sampled_from(["balanced", "effective"])


def batch(classes: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(9, classes, generator=generator)
    return logits.requires_grad_(), torch.randint(classes, (9,), generator=generator)


@quick
@given(COUNTS, RULES, st.floats(1.0, 50.0))
def test_weights_keep_the_ceiling_and_a_mean_of_one_over_samples(counts: list[int], rule: Any, ceiling: float) -> None:
    weights = class_weights(plain(class_weights=rule, max_class_weight=ceiling), counts)
    samples = torch.tensor(counts, dtype=torch.float32)
    assert weights.max() <= ceiling * (1 + 1e-6)
    assert (weights * samples).sum() / samples.sum() == pytest.approx(1.0, rel=1e-5)
    assert [bool(weight > 0) for weight in weights] == [count > 0 for count in counts]


@quick
@given(COUNTS, RULES, st.floats(0.1, 50.0))
def test_a_rarer_class_never_weighs_less(counts: list[int], rule: Any, ceiling: float) -> None:
    weights = class_weights(plain(class_weights=rule, max_class_weight=ceiling), counts)
    ordered = [float(weight) for count, weight in sorted(zip(counts, weights, strict=True)) if count > 0]
    assert all(rarer >= commoner - 1e-6 for rarer, commoner in pairwise(ordered))


@quick
@given(COUNTS)
def test_balanced_classes_weigh_the_same_in_sum(counts: list[int]) -> None:
    weights = class_weights(plain(max_class_weight=1e9), counts)
    sums = [float(weight) * count for count, weight in zip(counts, weights, strict=True) if count]
    assert sums == pytest.approx([sum(counts) / len(sums)] * len(sums), rel=1e-5)


@quick
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_effective_weights_stand_in_the_ratio_of_effective_numbers(few: int, many: int) -> None:
    weights = class_weights(plain(class_weights="effective", max_class_weight=1e9), [few, many])
    ratio = sum(EFFECTIVE_NUMBER_BETA**i for i in range(many)) / sum(EFFECTIVE_NUMBER_BETA**i for i in range(few))
    assert float(weights[0] / weights[1]) == pytest.approx(ratio, rel=1e-4)


def test_a_hundredfold_class_weighs_the_ceiling_and_the_rest_makes_up_for_it() -> None:
    assert class_weights(plain(max_class_weight=4.0), [3, 297]).tolist() == pytest.approx([4.0, 288 / 297])
    assert class_weights(plain(max_class_weight=0.5), [3, 297]).tolist() == [0.5, 0.5]


@quick
@given(st.integers(0, 2**31), st.floats(0.0, 0.4), st.sampled_from(["cross_entropy", "focal"]))
def test_gamma_zero_is_torchs_cross_entropy_meaned_over_samples(seed: int, smoothing: float, name: Any) -> None:
    cfg = plain(name=name, focal_gamma=0.0, label_smoothing=smoothing)
    loss = build_loss(cfg, [10, 30, 5])
    assert isinstance(loss, WeightedLoss)
    logits, labels = batch(3, seed)
    each = functional.cross_entropy(logits, labels, loss.class_weights, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, labels), each.mean())


@quick
@given(st.integers(0, 2**31), st.floats(0.0, 0.4))
def test_focal_formula_goes_over_into_cross_entropy_as_gamma_falls_to_zero(seed: int, smoothing: float) -> None:
    weights = torch.tensor([0.5, 2.0, 1.0])
    logits, labels = batch(3, seed)
    focal, plain = WeightedLoss(weights, 1e-9, smoothing), WeightedLoss(weights, 0.0, smoothing)
    torch.testing.assert_close(focal(logits, labels), plain(logits, labels))


@quick
@given(st.integers(0, 2**31), st.floats(0.1, 5.0))
def test_focal_loss_is_lins_equation_5(seed: int, gamma: float) -> None:
    logits, labels = batch(2, seed)
    loss = build_loss(plain(name="focal", focal_gamma=gamma), [30, 10])
    assert isinstance(loss, WeightedLoss)
    p = logits.softmax(dim=1)[torch.arange(len(labels)), labels]
    expected = -(loss.class_weights[labels] * (1 - p) ** gamma * p.log()).mean()
    torch.testing.assert_close(loss(logits, labels), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_site_of_one_class_and_sure_logits_give_finite_gradients(name: Any, gamma: float, smoothing: float) -> None:
    loss = build_loss(plain(name=name, focal_gamma=gamma, label_smoothing=smoothing), [0, 12])
    for labels in (torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        logits = torch.tensor([[-200.0, 200.0], [200.0, -200.0], [0.0, 0.0], [1e-3, 0.0]], requires_grad=True)
        value = loss(logits, labels)
        value.backward()
        assert value.isfinite()
        assert logits.grad is not None and logits.grad.isfinite().all()


@quick
@given(st.integers(0, 2**31))
def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_samples(seed: int) -> None:
    loss = build_loss(plain(name="focal"), [30, 10])
    logits, labels = batch(2, seed)
    each = [loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    torch.testing.assert_close(loss(logits, labels), torch.stack(each).mean())


def test_no_class_weights_means_ones() -> None:
    assert class_weights(plain(class_weights="none"), [0, 3, 7]).tolist() == [1.0, 1.0, 1.0]


def test_a_site_without_samples_is_told_so() -> None:
    with pytest.raises(EmptySiteError, match="at least one"):
        build_loss(plain(), [0, 0])


@quick
@given(st.integers(0, 2**31))
def test_half_precision_logits_are_judged_in_float32(seed: int) -> None:
    logits, labels = batch(2, seed)
    half = logits.detach().to(torch.bfloat16)
    assume(half.isfinite().all())
    loss = build_loss(plain(), [30, 10])
    torch.testing.assert_close(loss(half, labels), loss(half.float(), labels))


def test_logit_adjustment_finds_the_evidence_that_all_sites_share() -> None:
    """Two sites see one feature distribution under opposite class shares; with the adjustment both fit the same decision function."""
    generator = torch.Generator().manual_seed(0)
    slopes = []
    for counts in ([9000, 1000], [1000, 9000]):
        labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
        features = torch.randn(len(labels), generator=generator) + 2.0 * labels
        loss = build_loss(plain(class_weights="none", logit_adjustment=True), counts)
        weights = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def closure(
            features: Tensor = features, labels: Tensor = labels, loss: nn.Module = loss, weights: Tensor = weights
        ) -> Tensor:
            weights.grad = None
            score = weights[0] + weights[1] * features
            value: Tensor = loss(torch.stack([torch.zeros_like(score), score], dim=1), labels)
            value.backward()
            return value

        optimizer.step(closure)
        slopes.append(weights.detach())
    torch.testing.assert_close(slopes[0], torch.tensor([-2.0, 2.0]), atol=0.4, rtol=0)
    torch.testing.assert_close(slopes[1], torch.tensor([-2.0, 2.0]), atol=0.4, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.3])
def test_a_site_with_one_class_hardly_moves_the_weights_under_logit_adjustment(smoothing: float) -> None:
    logits = torch.zeros(8, 2, requires_grad=True)
    labels = torch.ones(8, dtype=torch.int64)
    gradients = {}
    for adjusted in (False, True):
        loss = build_loss(plain(class_weights="none", logit_adjustment=adjusted, label_smoothing=smoothing), [0, 200])
        (gradients[adjusted],) = torch.autograd.grad(loss(logits, labels), logits)
    assert gradients[True].abs().max() < 0.02 * gradients[False].abs().max()


@quick
@given(COUNTS, st.floats(0.01, 0.4), st.data())
def test_smoothed_labels_ask_the_same_logits_of_every_site(counts: list[int], smoothing: float, data: Any) -> None:
    classes = len(counts)
    label = data.draw(st.integers(0, classes - 1))
    smoothed = torch.full((classes,), smoothing / classes)
    smoothed[label] += 1.0 - smoothing
    loss = build_loss(plain(class_weights="none", logit_adjustment=True, label_smoothing=smoothing), counts)
    logits = smoothed.log()[None].requires_grad_()
    loss(logits, torch.tensor([label])).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)
