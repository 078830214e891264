"""The sum of clipped gradients of a batch's units, in one forward and one backward pass.

    forward     each trained layer's input is kept; parameters carry no gradient, so autograd computes only that of activations
    backward    as a layer's output gradient comes by, its units' gradients or what bounds their lengths is taken
    then        each unit's factor, by its bound (`clip_factors`), and the sum of the scaled gradients is added to each `grad`

`ClippedGradients` runs these steps for a model; `client.privacy.layer_gradients` has what a unit is and what one layer adds.

What one image adds can be clipped only where no image enters another's result. The networks of the list were built so; of a study's own it
is tried (`refuse_mixing`, `refuse_mixing_loss`). The hospital has approved that code: this finds mistakes, such as a mean over the batch,
and no code that hides what it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pneumofed.client.privacy.layer_gradients import TINY, LayerGradients, LengthBound, check_layer, gradients_of
from pneumofed.common.errors import ConfigError

TRIED_IMAGES = 3
"""Tried together, each exchanged once."""
RESULT_TOLERANCE = 1e-5
"""Of a layer's result, over its largest one: another kernel may round otherwise."""
LOSS_TOLERANCE = 1e-5
"""Of the mean loss of a batch against the mean of single losses, relative: sums are taken in another order."""


class ClippedGradients:
    """Adds up clipped gradients of the trainable parameters of `model`.

    Guarantee: what one unit adds to the sum of a batch is no longer than `max_grad_norm`, over all parameters together, whatever the
    weights, the images and the number type are: its factor comes from an upper bound of the length of what is added, which holds with
    all rounding (`LengthBound`). A unit whose gradient is not finite adds nothing, and counts as drawn all the same. In training, a
    unit whose gradient does not cancel away is clipped to the bound but for about 0.01 %.

    The guarantee is for a unit's own term. The last bits of the other units' gradients may depend on how many rows a kernel takes at
    once, and on the order in which a sum is taken, which no implementation of DP-SGD covers.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float, views: int = 1) -> None:
        """Takes the parameters that are trainable now.

        Raises:
            ConfigError: a layer with trainable parameters has no rule (see `check_layer`), is frozen in part, or shares a parameter.
        """
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._layers = [
            (name, layer) for name, layer in model.named_modules() if any(p.requires_grad for p in layer.parameters(False))
        ]
        for name, layer in self._layers:
            check_layer(name, layer)
            if not all(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                raise ConfigError(f"{name}: private training takes a layer whole; freeze all of its parameters or none")
        owners = Counter(id(parameter) for _, layer in self._layers for parameter in layer.parameters(recurse=False))
        if max(owners.values(), default=0) > 1:
            raise ConfigError("two layers share a parameter, whose gradient is a sum that private training has no rule for")
        self._model, self._max_grad_norm, self._views = model, max_grad_norm, views
        self._gradients: list[LayerGradients] = []
        self._units: int | None = None
        self._seen: set[nn.Module] = set()

    def add(self, compute_loss: Callable[[], Tensor], units: int | None = None) -> Tensor:
        """Each unit's clip factor, float32 [units]; the clipped sum is added to `grad` of the parameters.

        Args:
            compute_loss: runs the model once on a batch of `units * views` rows and returns the sum over units of the mean loss of
                the unit's views. No unit's loss may depend on another's.
            units: in the batch. A layer may see more rows of each, one after the other, as those that see the slices of a volume one by
                one. None: every layer sees `views` rows of a unit.

        Raises:
            ConfigError: a layer runs twice in one pass, so that its gradients are sums whose norms are not the parts', or it sees no whole
                number of views of each unit.
        """
        self._units = units
        device = self.parameters[0].device.type
        with self._recording():
            loss = compute_loss()
            with torch.autocast(device, enabled=False):  # a caller's autocast would round the sums
                loss.backward()
            gradients, self._gradients = self._gradients, []
        with torch.no_grad(), torch.autocast(device, enabled=False), _full_precision():
            return self._clip(gradients)

    def fill_missing(self) -> None:
        """Gives a zero gradient to parameters without one, so that a step without any unit has a sum too."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip(self, gradients: list[LayerGradients]) -> Tensor:
        factors = clip_factors([layer.bound() for layer in gradients], self._max_grad_norm)
        silent = factors == 0.0
        if silent.all():  # the weights may be no numbers, which would make 0 of a sum no number either
            return factors
        for layer in gradients:
            if silent.any():
                layer.silence(silent)
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
        rows = self._views if self._units is None else len(inputs) // self._units
        if self._units is not None and (rows * self._units != len(inputs) or rows % self._views):
            raise ConfigError(
                f"a {type(layer).__name__} sees {len(inputs)} rows of {self._units} units: private training needs as many of each"
            )
        self._gradients.extend(gradients_of(layer, inputs, output_gradient.detach(), rows))


def clip_factors(bounds: Sequence[LengthBound], max_grad_norm: float) -> Tensor:
    """Computes each unit's clip factor, float32 [units] in [0, 1], such that factor * length + slack <= `max_grad_norm`.

    Rounded down: a factor that is no normal float32 number is 0, and so is that of a unit whose bound is not finite.

    Args:
        bounds: of the units' gradients, one for each parameter.
        max_grad_norm: C, above 0.
    """
    length = torch.stack([bound.length for bound in bounds]).square().sum(dim=0).sqrt()
    slack = torch.stack([bound.slack for bound in bounds]).square().sum(dim=0).sqrt()
    allowed = ((max_grad_norm - slack) / length * (1.0 - 2.0**-22)).clamp_max(1.0)
    usable = length.isfinite() & slack.isfinite() & (allowed >= 2.0 * TINY)
    return torch.where(usable, allowed, 0.0).float()


@contextmanager
def _full_precision() -> Iterator[None]:
    """No product of float32 numbers in TF32 or bfloat16, which a caller may have allowed: the bounds are those of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def refuse_mixing(network: nn.Module, in_channels: int, size_px: int) -> None:
    """Refuses a network in which an image changes what a layer gives of another image, or whose buffers images change.

    Args:
        network: in the mode and with the frozen parts that it is trained with; left as it was.
        in_channels: of the images.
        size_px: their side.

    Raises:
        ConfigError: names the layer, or the buffer.
    """
    device = next(network.parameters()).device
    drawn = torch.randn(TRIED_IMAGES + 1, in_channels, size_px, size_px, generator=torch.Generator().manual_seed(1))
    drawn = drawn.to(device, memory_format=torch.channels_last)
    images, other = drawn[:TRIED_IMAGES], drawn[TRIED_IMAGES]
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        before = _outputs(network, images)
        for number in range(TRIED_IMAGES):
            exchanged = images.clone()
            exchanged[number] = other
            rest = [row for row in range(TRIED_IMAGES) if row != number]
            _compare(before, _outputs(network, exchanged), rest)
        changed = [name for name, buffer in network.named_buffers() if not torch.equal(buffer, buffers[name])]
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
    if changed:
        raise ConfigError(
            f"{changed[0]} keeps statistics of images, which would leave without noise: private training allows none"
        )


def refuse_mixing_loss(loss: nn.Module, classes: int) -> None:
    """Refuses a loss that is not the mean of the losses of single images.

    Args:
        loss: (logits [N, C], labels [N]) -> a scalar.
        classes: C.

    Raises:
        ConfigError: it is another number than that mean.
    """
    device = next((buffer.device for buffer in loss.buffers()), None)
    logits = 2.0 * torch.randn(4, classes, generator=torch.Generator().manual_seed(2)).to(device)
    labels = (torch.arange(4) % classes).to(device)
    together = float(loss(logits, labels))
    single = [float(loss(logits[row : row + 1], labels[row : row + 1])) for row in range(4)]
    mean = sum(single) / 4
    if not abs(together - mean) <= LOSS_TOLERANCE * max(abs(mean), 1.0):
        raise ConfigError(
            f"the loss of four images is {together:.4g} and the mean of their losses {mean:.4g}: private training needs the mean, since no "
            "image's loss may depend on another"
        )


def _outputs(network: nn.Module, images: Tensor) -> list[tuple[str, Tensor]]:
    """Of every layer with parameters of its own, in the order of the runs; random draws are the same in every call."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((name, output.detach().clone()))

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in network.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(3)
            keep("the logits", network(images))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _compare(before: Sequence[tuple[str, Tensor]], after: Sequence[tuple[str, Tensor]], rows: Sequence[int]) -> None:
    if [name for name, _ in before] != [name for name, _ in after]:
        raise ConfigError("which layers run depends on the images: private training needs the same ones for each")
    for (name, one), (_, two) in zip(before, after, strict=True):
        if len(one) != TRIED_IMAGES:
            raise ConfigError(
                f"{name} sees {len(one)} rows of {TRIED_IMAGES} images: private training needs one row an image, in order"
            )
        near = RESULT_TOLERANCE * float(one.abs().max())
        if not torch.allclose(one[rows], two[rows], rtol=0.0, atol=near):
            raise ConfigError(f"{name} gives an image another result beside other images: private training needs each by itself")
