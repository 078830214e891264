"""The sum of clipped gradients of a batch's units, in one forward and one backward pass.

    forward     each trained layer's input is kept; parameters carry no gradient, so autograd computes only that of activations
    backward    as a layer's output gradient comes by, its units' gradients or their norms are taken (`gradients_of`)
    then        each unit's factor min(1, max_grad_norm / norm), and the sum of the scaled gradients is added to each `grad`

`ClippedGradients` runs these steps for a model. `LayerGradients` is what one layer adds to each unit's gradient, from the layer's input
and the gradient of its output: norms first, then the clipped sum.

A unit is what the mechanism clips: one image, or several augmented views of one image, whose gradients are averaged. Rows of a batch
come unit by unit, `views` rows each.

Linear layers and convolutions are matrix products over positions: with A [T, D] the input (for a convolution its patches) and B [T, O]
the output's gradient at the T positions of a unit, the unit's weight gradient is B^T A. Either it is computed (`PerUnit`), or only its
norm is, ||B^T A||^2 = <A A^T, B B^T> ("ghost norm", Li et al. 2022, section 4; for convolutions Bu et al. 2022, section 3), and the
clipped sum is one ordinary weight gradient whose rows are scaled by the clip factors ("book-keeping", Bu et al. 2023, section 2). The
cheaper of the two is taken layer by layer. This is ours: Opacus' rules compute every unit's gradient of every layer.

In half precision a unit's own gradient may be rounded, but sums over units are float32, so that the rounding of a sum, which the
noise is not calibrated to, stays as small as it is in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.errors import ConfigError
from pneumofed.common.models.layers import StandardizedConv2d

NORM_EPSILON = 1e-6
"""Added to norms, as Opacus does, so that a unit without gradient divides by no zero."""
ROW_COST = 64
"""Products that take as long as writing and reading one number of a per-unit gradient, measured on an AVX-512 CPU."""
CHUNK_NUMBERS = 1 << 20
"""Numbers of patches that are made at a time: they should stay in a core's cache."""
WeightedLayer = nn.Conv2d | nn.Linear


class ClippedGradients:
    """Adds up clipped gradients of the trainable parameters of `model`.

    Guarantee: what one unit adds to the sum of a batch is no longer than `max_grad_norm`, over all parameters together, up to float32
    rounding. A unit whose gradient is not finite adds nothing. In half precision the guarantee is for a unit's own term: the last
    bits of the other units' gradients may depend on how many rows a kernel takes at once, which no implementation of DP-SGD covers.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float, views: int = 1) -> None:
        """Takes the parameters that are trainable now.

        Raises:
            ConfigError: a layer with trainable parameters has no rule (see `check_layer`), or is frozen in part.
        """
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._layers = [
            (name, layer) for name, layer in model.named_modules() if any(p.requires_grad for p in layer.parameters(False))
        ]
        for name, layer in self._layers:
            check_layer(name, layer)
            if not all(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                raise ConfigError(f"{name}: private training takes a layer whole; freeze all of its parameters or none")
        self._model, self._max_grad_norm, self._views = model, max_grad_norm, views
        self._gradients: list[LayerGradients] = []
        self._seen: set[nn.Module] = set()

    def add(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        """Each unit's clip factor, float32 [units]; the clipped sum is added to `grad` of the parameters.

        Args:
            compute_loss: runs the model once on a batch of `units * views` rows and returns the sum over units of the mean loss of
                the unit's views. No unit's loss may depend on another's.

        Raises:
            ConfigError: a layer runs twice in one pass, so that its gradients are sums whose norms are not the parts'.
        """
        device = self.parameters[0].device.type
        with self._recording():
            loss = compute_loss()
            with torch.autocast(device, enabled=False):  # a caller's autocast would round the sums
                loss.backward()
            gradients, self._gradients = self._gradients, []
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return self._clip(gradients)

    def fill_missing(self) -> None:
        """Gives a zero gradient to parameters without one, so that a step without any unit has a sum too."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip(self, gradients: list[LayerGradients]) -> Tensor:
        norms = torch.stack([layer.squared_norms() for layer in gradients]).sum(dim=0).sqrt()
        broken = ~norms.isfinite()
        factors = torch.where(broken, 0.0, (self._max_grad_norm / (norms + NORM_EPSILON)).clamp_max(1.0))
        for layer in gradients:
            if broken.any():
                layer.silence(broken)
            layer.add(factors)
        return factors

    @contextmanager
    def _recording(self) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._watch) for _, layer in self._layers]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self._gradients, self._seen = [], set()
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Below the first trained layer nothing needs a gradient: its output becomes the graph's first node."""
        if layer in self._seen:
            raise ConfigError(f"a {type(layer).__name__} runs twice in one pass, which private training has no rule for")
        self._seen.add(layer)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(partial(self._keep, layer, inputs[0].detach()))
        return output

    def _keep(self, layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> Any:
        self._gradients.extend(gradients_of(layer, inputs, output_gradient.detach(), self._views))


class LayerGradients(Protocol):
    """The gradients of a batch's units with respect to one parameter."""

    def squared_norms(self) -> Tensor:
        """float32 [units]."""

    def add(self, factors: Tensor) -> None:
        """Adds the sum of the units' gradients, each times its factor, float32 [units], to the parameter's `grad`."""

    def silence(self, units: Tensor) -> None:
        """Sets the gradients of `units`, bool [units], to zero."""


@dataclass
class PerUnit:
    """Gradients in memory, [units, P], in the order that `_shaped` undoes."""

    parameter: Tensor
    gradients: Tensor

    def squared_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients, dim=1, dtype=torch.float32).square()

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

    def squared_norms(self) -> Tensor:
        a, b = self.inputs.float(), self.outputs.float()
        if not isinstance(self.layer, StandardizedConv2d):
            return _ghost_norms(a, b)
        rows, scale = self.layer.standardize_rows()
        along_ones = torch.einsum("nto,nt->no", b, a.sum(dim=2))
        along_rows = (b * (a @ rows.T)).sum(dim=1)
        missing = self.layer.squared_loss(along_ones, along_rows).sum(dim=1)
        return (_ghost_norms(a, b * scale) - missing).clamp_min(0.0)

    def add(self, factors: Tensor) -> None:
        b = (self.outputs.float() * factors[:, None, None]).flatten(0, 1)
        total = b.T @ self.inputs.float().flatten(0, 1)
        if isinstance(self.layer, StandardizedConv2d):
            total = self.layer.pull_back(total)
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
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.dilation != (1, 1):
            raise ConfigError(f"{name}: private training knows no dilation and only zero padding in numbers; take another model")
    elif type(layer) not in (nn.Linear, nn.GroupNorm):
        raise ConfigError(f"{name}: private training has no rule for a {type(layer).__name__}; freeze it or take another model")


def gradients_of(layer: nn.Module, inputs: Tensor, outputs: Tensor, views: int) -> Iterator[LayerGradients]:
    """Takes the gradients of the layer's parameters from its input and the gradient of its output.

    Args:
        layer: one that `check_layer` lets pass.
        inputs: its input, [units * views, ...], images as [N, C, H, W].
        outputs: the gradient of its output, with the same number of rows.
        views: rows of a unit, which come one after the other.

    Raises:
        TypeError: the layer has no rule.
    """
    if isinstance(layer, nn.GroupNorm):
        return _group_norm(layer, inputs, outputs, views)
    if isinstance(layer, nn.Conv2d | nn.Linear):
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
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return False
    out, width = len(layer.weight), layer.weight[0].numel()
    more = positions * width * out if isinstance(layer, StandardizedConv2d) else 0
    return positions**2 * (width + out) + more < ROW_COST * width * out


def _ghost_norms(a: Tensor, b: Tensor) -> Tensor:
    return ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)).clamp_min(0.0)


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
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
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
    (height, width), (down, right), (pad_y, pad_x) = layer.kernel_size, layer.stride, _numbers(layer)
    images = functional.pad(inputs.permute(0, 2, 3, 1), (0, 0, pad_x, pad_x, pad_y, pad_y))
    windows = images.unfold(1, height, down).unfold(
        2, width, right
    )  # [rows, out height, out width, channels, kernel height, kernel width]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(len(inputs), -1, height * width, inputs.shape[1])


def _numbers(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer.padding, str):
        raise TypeError("expected a convolution that check_layer lets pass")
    return layer.padding[0], layer.padding[1]


def _positions(outputs: Tensor) -> Tensor:
    """[rows, positions, channels] of a feature map or of features; a view where the map is channels-last."""
    return outputs.permute(0, 2, 3, 1).flatten(1, 2) if outputs.ndim == 4 else outputs[:, None, :]


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
    if parameter.ndim == 4:
        out, channels, height, width = parameter.shape
        total = total.view(out, height, width, channels).permute(0, 3, 1, 2)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(total.reshape(parameter.shape))
