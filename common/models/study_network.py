"""A study's own network: made by the function of its file, and traced once, so that training, export and maps know its layers.

What the rest of the code asks of a network of its own list, a run with drawn numbers shows of any other: the classifier (the linear
layer whose output the logits are), the first convolution, and the feature maps of which the classifier's input is the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.study_code import StudyCode, call_with, describe_error

TRACED_SIDES = (128, 224, 64, 96, 32, 256, 160, 192, 320, 384, 48, 512)
"""Sides in pixels that are tried, the first that works is taken: what is found does not depend on it, but a network may have one size."""
TRACED_IMAGES = 2


class TracedLayers(NamedTuple):
    """Names of modules: of the first convolution, the classifier, the maps it sees the averages of, the last maps whose averages any layer
    sees, and maps of twice as many cells as those."""

    first: str | None
    head: str
    maps: str | None
    pooled: str | None
    finer_maps: str | None


class _Step(NamedTuple):
    """One module's run: its name, itself, its first input and its output."""

    name: str
    module: nn.Module
    given: Any
    output: Tensor


def make_study_network(code: StudyCode, classes: int, in_channels: int) -> nn.Module:
    """Calls the study's function; random weights come from torch's global generator.

    Args:
        code: its function may take `classes` (or `num_classes`) and `in_channels`.
        classes: number of logits.
        in_channels: 1 or 3.

    Raises:
        ConfigError: it raises, or returns no network with parameters of floating point numbers.
    """
    model = call_with(code, {"classes": classes, "num_classes": classes, "in_channels": in_channels})
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{code} returns {type(model).__name__}, expected a network (torch.nn.Module)")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"{code}: the network has no parameters, so there is nothing to train")
    for name, tensor in tensors:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ConfigError(f"{code}: {name} has no shape before the first image (a lazy layer); give its sizes")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ConfigError(f"{code}: {name} is {str(tensor.dtype).removeprefix('torch.')}; weights travel as float32")
    return model


def trace_layers(model: nn.Module, code: StudyCode, classes: int, in_channels: int) -> TracedLayers:
    """Runs the network once on drawn numbers and finds its layers; weights, buffers, modes and generators stay as they are.

    Args:
        model: what `make_study_network` made.
        code: named in errors.
        classes: number of logits.
        in_channels: of the images.

    Raises:
        ConfigError: it runs with no square image that is tried, its output is no logits, or no linear layer makes them.
    """
    images, logits, steps = _run(model, code, in_channels)
    if not isinstance(logits, Tensor) or logits.shape != (TRACED_IMAGES, classes):
        came = f"[{', '.join(map(str, logits.shape))}]" if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"{code}: of {TRACED_IMAGES} images the network gives {came}, expected logits [{TRACED_IMAGES}, {classes}]"
        )
    head = next((step for step in reversed(steps) if isinstance(step.module, nn.Linear) and step.output is logits), None)
    if head is None or head.given.ndim != 2:
        raise ConfigError(
            f"{code}: the logits are not the output of an nn.Linear on features [N, D]; end the network with one: its input is what "
            "suitability, drift, frozen bodies and maps look at"
        )
    first = next(
        (step.name for step in steps if isinstance(step.module, nn.Conv2d) and step.given is images), None
    )  # of a network that does something else first: no tensor's name
    maps = next((step for step in reversed(steps) if _is_averaged(step.output, head.given)), None)
    seen = [tensor.flatten(1) for step in steps for tensor in (step.given, step.output) if _is_vector(tensor)]
    pooled = maps or next((step for step in reversed(steps) if any(_is_averaged(step.output, one) for one in seen)), None)
    finer = next((step.name for step in reversed(steps) if pooled and _has_twice_the_cells(step.output, pooled.output)), None)
    return TracedLayers(first, head.name, maps.name if maps else None, pooled.name if pooled else None, finer)


def refuse_batch_statistics(model: nn.Module, code: StudyCode, in_channels: int) -> None:
    """Refuses a network that keeps statistics of a batch although `model.norm` is `group`, on which private training relies.

    Args:
        model: after `replace_batch_norm`.
        code: named in errors.
        in_channels: of the images.

    Raises:
        ConfigError: a BatchNorm is left, or a buffer changes in training, and would leave the hospital without noise.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{code}: model.norm is 'group', but {name} is a {type(module).__name__}, which has no such form here"
            )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _run(model, code, in_channels, training=True)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before.get(name, buffer.new_empty(0)))]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in changed and name in before:
                buffer.copy_(before[name])
    if changed:
        raise ConfigError(
            f"{code}: {changed[0]} keeps statistics of the images that it sees, which would leave without noise; with model.norm 'group' "
            "a network may keep none"
        )


def _run(model: nn.Module, code: StudyCode, in_channels: int, *, training: bool = False) -> tuple[Tensor, Any, list[_Step]]:
    """Images, what the network makes of them, and each module's run in the order of their ends."""
    modes = {module: module.training for module in model.modules()}
    problems: list[str] = []
    try:
        model.train(training)
        for side in TRACED_SIDES:
            images = torch.randn(TRACED_IMAGES, in_channels, side, side, generator=torch.Generator().manual_seed(0))
            images = images.to(memory_format=torch.channels_last)  # as in training: a `view` that needs another order fails here
            steps: list[_Step] = []
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad(), _watching(model, steps):
                    return images, model(images), steps
            except Exception as error:
                problems.append(describe_error(error))
    finally:
        for module, mode in modes.items():
            module.training = mode
    raise ConfigError(f"{code}: the network raises {problems[0]}, given {TRACED_IMAGES} images of {TRACED_SIDES[0]} px")


def _watching(model: nn.Module, steps: list[_Step]) -> ExitStack:
    stack = ExitStack()
    for name, module in model.named_modules():

        def keep(module: nn.Module, given: Sequence[Any], output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and given:
                steps.append(_Step(name, module, given[0], output))

        stack.callback(module.register_forward_hook(keep).remove)
    return stack


def _is_averaged(maps: Tensor, features: Tensor) -> bool:
    """Whether `features` [N, D] are the averages of `maps` [N, D, h, w] over more than one cell."""
    if maps.ndim != 4 or maps.shape[:2] != features.shape or maps.shape[2] * maps.shape[3] == 1:
        return False
    return torch.allclose(maps.mean(dim=(2, 3)), features, rtol=1e-4, atol=1e-6)


def _is_vector(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim in (2, 4) and tensor[0].numel() == tensor.shape[1]


def _has_twice_the_cells(output: Tensor, maps: Tensor) -> bool:
    return output.ndim == 4 and output.shape[2] == 2 * maps.shape[2] and output.shape[3] == 2 * maps.shape[3]
