"""What one layer adds to each unit's gradient: bounds of its length first, then the clipped sum.

A unit is what the mechanism clips: one image, or several augmented views of one image, whose gradients are averaged. Rows of a batch
come unit by unit, `views` rows each.

Linear layers and convolutions are matrix products over positions: with A [T, D] the input (for a convolution its patches) and B [T, O]
the output's gradient at the T positions of a unit, the unit's weight gradient is B^T A. Either it is computed (`PerUnit`), or only its
norm is, ||B^T A||^2 = <A A^T, B B^T> ("ghost norm", Li et al. 2022, section 4; for convolutions Bu et al. 2022, section 3), and the
clipped sum is one ordinary weight gradient whose rows are scaled by the clip factors ("book-keeping", Bu et al. 2023, section 2). The
cheaper of the two is taken layer by layer. This is ours: Opacus' rules compute every unit's gradient of every layer.

Who chooses the weights chooses A and B, and can make B^T A vanish beside them. So no length here is an estimate: each is an upper bound
of what `add` adds, in whatever order sums are taken, with the rounding of both computations in it (`LengthBound`). Rounding errors are
Higham 2002's, chapter 3: a sum of n products is wrong by at most n u times the sum of their absolute values, u the number type's unit
roundoff, and every bound has room for the terms of order u^2. Numbers below the smallest normal one may be flushed to zero.

In half precision a unit's own gradient may be rounded, but sums over units are float32, so that the rounding of a sum, which the
noise is not calibrated to, stays as small as it is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.errors import ConfigError
from pneumofed.common.models.layers import StandardizedConv2d

ROW_COST = 64
"""Products that take as long as writing and reading one number of a per-unit gradient, measured on an AVX-512 CPU."""
CHUNK_NUMBERS = 1 << 20
"""Numbers of patches that are made at a time: they should stay in a core's cache."""
BLOCK = 64
"""Squares that are added up in float32 before float64 takes over."""
ROUNDOFF, ROUNDOFF_64 = 2.0**-24, 2.0**-53
"""Unit roundoff u of float32 and of float64."""
TINY = 2.0**-126
"""The smallest normal number of float32: what is smaller may count as 0."""
LARGEST_CANCELLATION = 64.0
"""A unit's gradient counts as no shorter than this part of its products' lengths, sum_t ||a_t|| ||b_t||.

The rounding of a float32 sum is as large as what cancels in it. Networks of the registry stay below 11 at their first weights; beyond
the limit, which only chosen weights reach, a unit is clipped harder, so that its rounding stays small against the bound too."""
Convolution = nn.Conv2d | nn.Conv3d
WeightedLayer = Convolution | nn.Linear


class LengthBound(NamedTuple):
    """What a unit adds under a factor f in [0, 1] is no longer than f * length + slack; float64 [units] each.

    `slack` is what numbers too small for float32 can do. Not finite where the unit's gradient is not, or is too long to be squared.
    """

    length: Tensor
    slack: Tensor


class LayerGradients(Protocol):
    """The gradients of a batch's units with respect to one parameter."""

    def bound(self) -> LengthBound:
        """How long what `add` adds of each unit can be."""

    def add(self, factors: Tensor) -> None:
        """Adds the sum of the units' gradients, each times its factor, float32 [units], to the parameter's `grad`."""

    def silence(self, units: Tensor) -> None:
        """Sets the gradients of `units`, bool [units], to zero."""


@dataclass
class PerUnit:
    """Gradients in memory, [units, P], in the order that `_accumulate` undoes."""

    parameter: Tensor
    gradients: Tensor

    def bound(self) -> LengthBound:
        """The length of the very numbers that are added.

        Squares of `BLOCK` numbers are added in float32, wrong by (BLOCK + 1) u of a sum of squares, which is half of that of its root.
        Squares below `TINY` may be lost, sqrt(P TINY) of length in all. The product with the factor is rounded once.
        """
        units, size = self.gradients.shape
        whole = size // BLOCK * BLOCK
        blocks = self.gradients[:, :whole].reshape(units, size // BLOCK, BLOCK)
        squares = _float32_lengths(blocks).square().sum(dim=1) + _float32_lengths(self.gradients[:, whole:]).square()
        length = squares.sqrt() * (1.0 + (BLOCK + 4) * ROUNDOFF) + (size * TINY) ** 0.5
        return LengthBound(length, torch.full_like(length, size**0.5 * TINY))

    def add(self, factors: Tensor) -> None:
        _accumulate(self.parameter, factors @ self.gradients.float())

    def silence(self, units: Tensor) -> None:
        self.gradients[units] = 0.0


@dataclass
class Ghost:
    """Inputs [units, T, D] and output gradients [units, T, O], in place of the gradients of the layer's weight."""

    layer: WeightedLayer
    inputs: Tensor
    outputs: Tensor

    def bound(self) -> LengthBound:
        """The ghost norm in float64, and the rounding of what `add` computes in float32.

        With P = sum_t ||a_t|| ||b_t||, for a standardised convolution b times the rows' s:

        float64, of the square: its Gram matrices and their product have D + O + T^2 terms, whose absolute values add up to at most P^2.
        float32, of the length: a unit's products are rounded with their factors and added up over T, and `pull_back` rounds ten times
            more; since J only shortens (`StandardizedConv2d`), all is at most (T + 16) u P.
        """
        (_, positions, width), out = self.inputs.shape, self.outputs.shape[2]
        standardized = self.layer if isinstance(self.layer, StandardizedConv2d) else None
        rows, scale = standardized.standardize_rows() if standardized else (None, self.layer.weight.new_ones(1))
        at_once = max(1, CHUNK_NUMBERS // (4 * positions * (width + out)))
        lots = zip(self.inputs.split(at_once), self.outputs.split(at_once), strict=True)
        pieces = [_products_of(a.float(), b.double() * scale.double(), rows) for a, b in lots]
        squares, products, inputs, along = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        if standardized:
            squares = squares - standardized.least_loss(*along.unbind(dim=1)).sum(dim=1)
        squares = squares + 4.0 * (width + out + positions**2 + 16) * ROUNDOFF_64 * products.square()
        length = squares.clamp_min(0.0).sqrt() + (positions + 16) * ROUNDOFF * products
        flushed = out**0.5 * inputs + 2.0 * positions * (out * width) ** 0.5
        longest = torch.maximum(length, products / LARGEST_CANCELLATION)
        return LengthBound(longest * (1.0 + 1e-9), TINY * flushed * scale.double().max().clamp_min(1.0))

    def add(self, factors: Tensor) -> None:
        b = (self.outputs.float() * factors[:, None, None]).flatten(0, 1)
        total = b.T @ self.inputs.float().flatten(0, 1)
        if isinstance(self.layer, StandardizedConv2d):
            total = self.layer.pull_back(total, sums=torch.float64)
        _accumulate(self.layer.weight, total)

    def silence(self, units: Tensor) -> None:
        self.inputs[units] = 0.0
        self.outputs[units] = 0.0


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuses a layer that has parameters and no rule here.

    Args:
        name: the layer's name in the model, for the message.
        layer: one with trainable parameters of its own.

    Raises:
        ConfigError: names the layer, and what to do.
    """
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise ConfigError(
            f"{name}: BatchNorm mixes the images of a batch, so that none has a gradient of its own; set model.norm: group"
        )
    if isinstance(layer, Convolution):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or set(layer.dilation) != {1}:
            raise ConfigError(f"{name}: private training knows no dilation and only zero padding in numbers; take another model")
    elif type(layer) not in (nn.Linear, nn.GroupNorm):
        raise ConfigError(f"{name}: private training has no rule for a {type(layer).__name__}; freeze it or take another model")


def gradients_of(layer: nn.Module, inputs: Tensor, outputs: Tensor, views: int) -> Iterator[LayerGradients]:
    """Takes the gradients of the layer's parameters from its input and the gradient of its output.

    Args:
        layer: one that `check_layer` lets pass.
        inputs: its input, [units * views, ...], images as [N, C, H, W], volumes as [N, C, D, H, W].
        outputs: the gradient of its output, with the same number of rows.
        views: rows of a unit, which come one after the other: of a layer that sees slices, the slices of its views.

    Raises:
        TypeError: the layer has no rule.
    """
    if isinstance(layer, nn.GroupNorm):
        return _group_norm(layer, inputs, outputs, views)
    if isinstance(layer, WeightedLayer):
        return _product(layer, inputs, outputs, views)
    raise TypeError(f"{type(layer).__name__}: expected a layer that check_layer lets pass")


def _product(layer: WeightedLayer, inputs: Tensor, outputs: Tensor, views: int) -> Iterator[LayerGradients]:
    b = _positions(outputs).reshape(len(outputs) // views, -1, layer.weight.shape[0])
    if layer.bias is not None:
        yield PerUnit(layer.bias, b.sum(dim=1, dtype=torch.float32))
    inputs = inputs.to(b.dtype)
    if _ghost_is_cheaper(layer, b.shape[1]):
        yield Ghost(layer, _patches(layer, inputs).reshape(*b.shape[:2], -1), b)
    else:
        yield PerUnit(layer.weight, _instantiate(layer, inputs, b).flatten(1))


def _ghost_is_cheaper(layer: WeightedLayer, positions: int) -> bool:
    """Norms take T^2 (D + O) products, and T D O more under standardisation; gradients in memory D O numbers, written and read."""
    if isinstance(layer, Convolution) and layer.groups > 1:
        return False
    out, width = len(layer.weight), layer.weight[0].numel()
    more = positions * width * out if isinstance(layer, StandardizedConv2d) else 0
    return positions**2 * (width + out) + more < ROW_COST * width * out


def _instantiate(layer: WeightedLayer, inputs: Tensor, b: Tensor) -> Tensor:
    """B^T A of each unit, [units, O, D], a few units at a time."""
    units, positions, out = b.shape
    views = len(inputs) // units
    gradients = b.new_empty(units, out, layer.weight[0].numel())
    at_once = max(1, CHUNK_NUMBERS // (positions * gradients.shape[2]))
    for start in range(0, units, at_once):
        end = min(start + at_once, units)
        patches = _patches(layer, inputs[start * views : end * views])
        gradients[start:end] = _multiply(layer, patches, b[start:end])
    return layer.pull_back(gradients.float()) if isinstance(layer, StandardizedConv2d) else gradients


def _multiply(layer: WeightedLayer, patches: Tensor, b: Tensor) -> Tensor:
    """B^T A [units, O, D] from patches [rows, positions of a row, kernel, channels]; a group's outputs see only its channels."""
    units, positions, out = b.shape
    groups = layer.groups if isinstance(layer, Convolution) else 1
    if groups == 1:
        return b.mT @ patches.reshape(units, positions, -1)
    kernel, channels = patches.shape[2:]
    a = patches.reshape(units, positions, kernel, groups, channels // groups).permute(0, 3, 1, 2, 4).flatten(3)
    b = b.reshape(units, positions, groups, out // groups).permute(0, 2, 3, 1)
    return (b @ a).flatten(1, 2)


def _patches(layer: WeightedLayer, inputs: Tensor) -> Tensor:
    """What each position of the output sees: [rows, positions, kernel, channels], a copy or a view."""
    if isinstance(layer, nn.Linear):
        return inputs[:, None, None, :]
    if isinstance(layer, nn.Conv3d):
        return _volume_patches(layer, inputs)
    (height, width), (down, right), (pad_y, pad_x) = layer.kernel_size, layer.stride, _numbers(layer)
    images = functional.pad(inputs.permute(0, 2, 3, 1), (0, 0, pad_x, pad_x, pad_y, pad_y))
    windows = images.unfold(1, height, down).unfold(
        2, width, right
    )  # [rows, out height, out width, channels, kernel height, kernel width]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(len(inputs), -1, height * width, inputs.shape[1])


def _volume_patches(layer: nn.Conv3d, inputs: Tensor) -> Tensor:
    """As `_patches`, of volumes: the kernel's numbers run over slices, rows and columns."""
    around = [side for padding in reversed(_numbers(layer)) for side in (padding, padding)]
    windows = functional.pad(inputs.permute(0, 2, 3, 4, 1), [0, 0, *around])
    for axis, (size, step) in enumerate(zip(layer.kernel_size, layer.stride, strict=True), start=1):
        windows = windows.unfold(axis, size, step)
    # [rows, out slices, out height, out width, channels, kernel slices, kernel height, kernel width]
    numbers = layer.kernel_size[0] * layer.kernel_size[1] * layer.kernel_size[2]
    return windows.permute(0, 1, 2, 3, 5, 6, 7, 4).reshape(len(inputs), -1, numbers, inputs.shape[1])


def _numbers(layer: Convolution) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        raise TypeError("expected a convolution that check_layer lets pass")
    return tuple(layer.padding)


def _positions(outputs: Tensor) -> Tensor:
    """[rows, positions, channels] of a feature map or of features; a view where the map is channels-last."""
    return (
        outputs.flatten(2).transpose(1, 2)
        if outputs.ndim == 5
        else (outputs.permute(0, 2, 3, 1).flatten(1, 2) if outputs.ndim == 4 else outputs[:, None, :])
    )


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, outputs: Tensor, views: int) -> Iterator[LayerGradients]:
    """Scale: the sum over positions of g (x - mean) / std, from the sums of g x and of g, since mean and std are a group's own."""
    rows, channels, groups = *inputs.shape[:2], layer.num_groups
    numbers = (rows, channels, inputs[0, 0].numel(), groups, layer.eps)
    _, mean, inverse_std = torch.native_group_norm(inputs, layer.weight, layer.bias, *numbers)
    mean, inverse_std = (of_group.float().repeat_interleave(channels // groups, dim=1) for of_group in (mean, inverse_std))
    x, g = _positions(inputs).float(), _positions(outputs).float()
    offset = g.sum(dim=1)
    scale = ((g * x).sum(dim=1) - mean * offset) * inverse_std
    yield PerUnit(layer.weight, scale.unflatten(0, (-1, views)).sum(dim=1))
    yield PerUnit(layer.bias, offset.unflatten(0, (-1, views)).sum(dim=1))


def _accumulate(parameter: Tensor, total: Tensor) -> None:
    """Adds `total`, whose numbers come in the order of a channels-last weight, to the parameter's gradient."""
    if parameter.ndim > 3:
        out, channels, *kernel = parameter.shape
        total = total.view(out, *kernel, channels).movedim(-1, 1)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(total.reshape(parameter.shape))


def _float32_lengths(vectors: Tensor) -> Tensor:
    """Of the last dimension, added up in float32; float64."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).double()


def _products_of(a: Tensor, b: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What bounds the length of B^T A, in float64: ||B^T A||^2, sum_t ||a_t|| ||b_t||, sum_t ||a_t||, and along 1 and u.

    Args:
        a: float32 [units, T, D].
        b: float64 [units, T, O].
        rows: u of a standardised convolution, float32 [O, D].

    Returns:
        Three of [units], and [units, 3, O] for `StandardizedConv2d.least_loss`, without `rows` of no use.
    """
    wide = a.double()
    gram_a, gram_b = wide @ wide.mT, b @ b.mT
    lengths, others = (gram.diagonal(dim1=1, dim2=2).sqrt() for gram in (gram_a, gram_b))
    lengths = lengths + a.shape[2] ** 0.5 * TINY
    along = b[:, :1]
    if rows is not None:
        width, longest = rows.shape[1], torch.linalg.vector_norm(rows, dim=1).max().double()
        error = (width + 4) * ROUNDOFF * longest * lengths + 2 * width * TINY  # of u . a_t, which float32 computes
        ones = wide.sum(dim=2)[:, None] @ b
        along = torch.cat([ones, (b * (a @ rows.T)).sum(dim=1, keepdim=True), error[:, None] @ b.abs()], dim=1)
    return (gram_a * gram_b).sum(dim=(1, 2)), (lengths * others).sum(dim=1), lengths.sum(dim=1), along
