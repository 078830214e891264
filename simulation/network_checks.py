"""What a study's own network and loss can do and cannot, tried on drawn numbers before a run starts.

    findings = check_network(experiment)     a row for each thing that pneumofed does with a network
    check_study(experiment, say)          the same before a simulation: says the rows, refuses what the run itself needs

Nothing is guessed: the network is built twice, takes a step, privately too, and becomes an ONNX graph that is compared with it.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.client.privacy.per_sample_gradients import ClippedGradients, refuse_mixing, refuse_mixing_loss
from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.models.architectures import architecture_of
from pneumofed.common.models.build import build_model, set_trainable, train_mode
from pneumofed.common.models.compute import channels_last
from pneumofed.common.models.recipe import build_loss
from pneumofed.common.ops.study_code import (
    StudyCode,
    describe_error,
    find_study_code,
    imported_names,
    is_study_code,
    study_codes_of,
)
from pneumofed.common.wire.fields import BLOCK
from pneumofed.common.wire.parameter_layout import ArraysLayout

Answer = Literal["yes", "no", "note"]
CHECKED_IMAGES, GRADIENT_TOLERANCE, GRAPH_TOLERANCE = 4, 1e-3, 1e-4
"""The tolerances are of the private sum of gradients against PyTorch's own, over the longest one, and of a logit, as an export allows."""


class NetworkFinding(NamedTuple):
    """One row: what was tried, the answer, why, and whether the run cannot do without."""

    name: str
    answer: Answer
    text: str
    needed: bool = False


def check_study(experiment: ExperimentConfig, say: Callable[[str], None]) -> list[NetworkFinding]:
    """Tries the study's own network and loss, and says every row.

    Args:
        experiment: names them.
        say: takes a line.

    Raises:
        ConfigError: something that the run needs is answered by no; says all of it.
    """
    findings = check_network(experiment)
    for found in findings:
        say(format_finding(found))
    refuse_unable(findings)
    return findings


def refuse_unable(findings: Sequence[NetworkFinding]) -> None:
    """Refuses what the run needs and cannot have.

    Raises:
        ConfigError: there is such a row.
    """
    if missing := [f"{found.name}: {found.text}" for found in findings if found.needed and found.answer == "no"]:
        raise ConfigError("; ".join(missing))


def format_finding(found: NetworkFinding) -> str:
    """Writes one row as a line."""
    return f"    {found.answer:<4}  {found.name}: {found.text}"


def check_network(experiment: ExperimentConfig) -> list[NetworkFinding]:
    """Tries what pneumofed does with a network, also one of the list, and with the study's own loss.

    Args:
        experiment: its network, loss, image size and privacy.

    Returns:
        The rows; the first say which code it is.

    Raises:
        ConfigError: the code is not here, or no network or loss comes of it.
    """
    codes = study_codes_of(experiment)
    model = _build(experiment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        named = [NetworkFinding("code", "yes", f"{code}, SHA-256 {code.digest}") for code in codes]
        first = [*named, *_packages(codes), *_size(experiment, model), _step(experiment, model)]
        if first[-1].answer == "no":  # nor could anything else be tried
            return first
        return [
            *first,
            _repeats(experiment),
            *_loss(experiment),
            _norms(experiment),
            _private(experiment),
            _graph(experiment, model),
            _maps(model),
        ]


def _build(experiment: ExperimentConfig) -> nn.Module:
    return build_model(experiment.model.without_weights(), experiment.task, experiment.seed)


def _classes(experiment: ExperimentConfig) -> int:
    return len(classes_of(experiment.task))


def _images(experiment: ExperimentConfig, count: int = CHECKED_IMAGES) -> Tensor:
    shape = (count, experiment.model.in_channels, *experiment.image.shape)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return drawn.to(memory_format=channels_last(drawn.ndim))


def _labels(experiment: ExperimentConfig, count: int = CHECKED_IMAGES) -> Tensor:
    return torch.arange(count) % _classes(experiment)


def _packages(codes: Sequence[StudyCode]) -> Iterator[NetworkFinding]:
    for code in codes:
        if foreign := foreign_imports(code):
            text = (
                f"{code.file} imports {', '.join(foreign)}, which pneumofed does not bring along: every hospital must install it"
            )
            yield NetworkFinding("packages", "note", text)


def _size(experiment: ExperimentConfig, model: nn.Module) -> Iterator[NetworkFinding]:
    layout = ArraysLayout.of(model)
    numbers = layout.parameter_count + layout.statistic_count
    bytes_a_number = {"float32": 4.0, "float16": 2.0, "int8": 1.0 + 4.0 / BLOCK}[experiment.strategy.update_precision]
    up = layout.parameter_count * bytes_a_number + 4 * layout.statistic_count
    text = f"{layout.parameter_count:,} parameters; {_megabytes(4 * numbers)} down and {_megabytes(up)} up, a site and round"
    yield NetworkFinding("size", "yes", text)


def _megabytes(number: float) -> str:
    return f"{number / 1e6:.3g} MB" if number >= 1e5 else f"{number / 1e3:.3g} kB"


def _repeats(experiment: ExperimentConfig) -> NetworkFinding:
    """The weights of two builds under one seed, and what they make of the same images."""
    model, again = _build(experiment), _build(experiment)
    weights, others = model.state_dict(), again.state_dict()
    if weights.keys() != others.keys() or not all(torch.equal(one, others[name]) for name, one in weights.items()):
        text = "two builds under one seed have other weights; draw them with torch's global generator, so that a run repeats bit for bit"
        return NetworkFinding("repeatable", "note", text)
    with torch.no_grad():
        answers = [network.eval()(_images(experiment)) for network in (model, again)]
    if not torch.equal(*answers):
        return NetworkFinding("repeatable", "note", "the same weights and images give other logits in evaluation")
    return NetworkFinding("repeatable", "yes", "one seed, one network")


def _step(experiment: ExperimentConfig, model: nn.Module) -> NetworkFinding:
    """One forward and backward pass in training at the run's own image size, under the run's loss."""
    name, side = "training", experiment.image.size_px
    trained = _trained(experiment, model)
    try:
        logits = model(_images(experiment))
        loss = build_loss(experiment.loss, [1] * _classes(experiment))(logits, _labels(experiment))
        loss.backward()
    except ConfigError as error:
        return NetworkFinding(name, "no", str(error), needed=True)
    except Exception as error:
        return NetworkFinding(name, "no", f"images of {side} px: {describe_error(error)}", needed=True)
    expected, came = [CHECKED_IMAGES, _classes(experiment)], list(logits.shape)
    if came != expected:
        return NetworkFinding(name, "no", f"logits {came}, expected {expected}", needed=True)
    gradients = {one: parameter.grad for one, parameter in model.named_parameters() if one in trained}
    model.zero_grad(set_to_none=True)
    if not (bool(loss.isfinite()) and all(one.isfinite().all() for one in gradients.values() if one is not None)):
        return NetworkFinding(name, "no", "the loss or a gradient of drawn images is no finite number", needed=True)
    if unused := [one for one, gradient in gradients.items() if gradient is None]:
        return NetworkFinding(name, "note", f"a step at {side} px works, but {len(unused)} tensors have no gradient: {unused[0]}")
    sides = ", ".join(map(str, (experiment.model.in_channels, *experiment.image.shape)))
    shapes = f"images [N, {sides}] to logits [N, {expected[1]}]"
    text = f"{shapes}; a step changes all {len(trained)} trained tensors, loss {float(loss.detach()):.3g}"
    return NetworkFinding(name, "yes", text)


def _trained(experiment: ExperimentConfig, model: nn.Module) -> tuple[str, ...]:
    names = set_trainable(model, experiment.model.freeze)
    train_mode(model)
    return names


def _loss(experiment: ExperimentConfig) -> Iterator[NetworkFinding]:
    if not is_study_code(experiment.loss.name):
        return
    private = experiment.privacy.mechanism != "none"
    try:
        refuse_mixing_loss(build_loss(experiment.loss, [1] * _classes(experiment)), _classes(experiment))
    except ConfigError as error:
        yield NetworkFinding("private loss", "no", str(error), needed=private)
    except Exception as error:
        yield NetworkFinding(
            "private loss", "no", f"{find_study_code(experiment.loss.name)} raises {describe_error(error)}", needed=True
        )
    else:
        yield NetworkFinding("private loss", "yes", "the mean of single images' losses")


def _norms(experiment: ExperimentConfig) -> NetworkFinding:
    """Of the network with BatchNorm: how many layers `model.norm` and FedBN are about."""
    plain = experiment.model.model_copy(update={"norm": "batch"}).without_weights()
    found = [type(one).__name__ for one in build_model(plain, experiment.task, 0).modules() if isinstance(one, _BatchNorm)]
    if not found:
        return NetworkFinding("BatchNorm", "yes", "none: nothing for FedBN to keep, nothing for model.norm to replace")
    other = sorted(set(found) - {"BatchNorm2d"})
    if other:
        return NetworkFinding(
            "BatchNorm", "note", f"{other[0]} among {len(found)}: model.norm 'group', and with it privacy, cannot be had"
        )
    return NetworkFinding("BatchNorm", "yes", f"{len(found)} layers, GroupNorm in their place with model.norm 'group'")


_BatchNorm = nn.modules.batchnorm._BatchNorm


def _private(experiment: ExperimentConfig) -> NetworkFinding:
    """DP-SGD's sum of single gradients, nothing clipped, against PyTorch's gradient of the summed loss."""
    needed = experiment.privacy.mechanism != "none"
    cfg = experiment.model if needed else experiment.model.model_copy(update={"norm": "group"})
    try:
        model = build_model(cfg.without_weights(), experiment.task, experiment.seed)
        _trained(experiment, model)
        if not experiment.image.slices:  # of a volume the layers of a 2.5-D network see single slices
            refuse_mixing(model, cfg.in_channels, experiment.image.size_px)
        far = _gradient_difference(experiment, model.eval())
    except ConfigError as error:
        return NetworkFinding("private training", "no", str(error).removeprefix(": "), needed)  # the network itself has no name
    except Exception as error:
        return NetworkFinding("private training", "no", describe_error(error), needed)
    if not far <= GRADIENT_TOLERANCE:
        text = f"single gradients differ from PyTorch's by {far:.2g} of the longest: a layer computes more than its class says"
        return NetworkFinding("private training", "no", text, needed)
    how = "" if needed else " (DP-SGD, with model.norm 'group')"
    return NetworkFinding("private training", "yes", f"every image has a gradient of its own{how}")


def _gradient_difference(experiment: ExperimentConfig, model: nn.Module) -> float:
    """Largest difference of a tensor's gradient, over the longest gradient of a tensor."""
    images, labels = _images(experiment), _labels(experiment)
    gradients = ClippedGradients(model, max_grad_norm=1e9)
    gradients.add(lambda: functional.cross_entropy(model(images), labels, reduction="sum"), len(images))
    summed = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in gradients.parameters]
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(model(images), labels, reduction="sum").backward()
    exact = [torch.zeros_like(one) if one.grad is None else one.grad for one in gradients.parameters]
    longest = max(float(one.norm()) for one in exact)
    return max(float((one - two).norm()) for one, two in zip(summed, exact, strict=True)) / max(longest, 1e-12)


def _graph(experiment: ExperimentConfig, model: nn.Module) -> NetworkFinding:
    """The ONNX graph of an export, run by ONNX Runtime beside the network."""
    from pneumofed.common.model_bundle.predictor import graph_inputs, open_session
    from pneumofed.server.export.graph import export_onnx, run_torch

    shape, channels = experiment.image.shape, experiment.model.in_channels
    images = np.random.default_rng(6).random((CHECKED_IMAGES - 1, 1, *shape), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="pneumofed-check-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(model.eval(), channels, shape, path)
            session = open_session(path.read_bytes())
            found = session.run(None, graph_inputs(session, images))
        except (BundleError, RuntimeError) as error:
            return NetworkFinding("export", "no", f"no model bundle can be made: {str(error).partition(chr(10))[0]}")
    exact = run_torch(model, channels, images)
    far = max(float(np.abs(one - two).max()) / max(1.0, float(np.abs(two).max())) for one, two in zip(found, exact, strict=True))
    if not far <= GRAPH_TOLERANCE:
        return NetworkFinding(
            "export", "no", f"the ONNX graph differs from the network by {far:.2g}; {GRAPH_TOLERANCE:g} is allowed"
        )
    return NetworkFinding(
        "export", "yes", f"the ONNX graph differs from the network by {far:.1g}; predict needs no code of the study"
    )


def _maps(model: nn.Module) -> NetworkFinding:
    found, others = architecture_of(model), "integrated-gradients, gradient-shap, occlusion, kernel-shap and lime"
    if found.pooled is None and found.in_channels is not None:
        return NetworkFinding(
            "explanations", "note", f"no feature maps are averaged over the picture: no Grad-CAM; {others} work"
        )
    layer = found.maps or found.pooled or "the scattering"
    text = f"Grad-CAM at {layer}{f', finer-layer at {found.finer_maps}' if found.finer_maps else ', without finer-layer'}"
    if found.maps is None and found.pooled is not None:
        text += ", but more layers follow its averages, so the graph and the reading room have no map"
    return NetworkFinding("explanations", "yes" if found.maps else "note", f"{text}; {others} too")


def foreign_imports(code: StudyCode) -> list[str]:
    """Lists the packages that the file imports and that no hospital has for sure: neither Python's nor what pneumofed asks for."""
    owners, expected, found = packages_distributions(), _required_distributions(), set()
    for name in imported_names(ast.parse(code.source)):
        top = name.partition(".")[0]
        if (
            top != "pneumofed"
            and top not in sys.stdlib_module_names
            and not {_plain(one) for one in owners.get(top, ())} & expected
        ):
            found.add(top)
    return sorted(found)


@cache
def _required_distributions() -> frozenset[str]:
    """pneumofed's requirements and theirs, without extras: what every hospital has installed."""
    found: set[str] = set()
    waiting = ["pneumofed"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):
            lines = [line for line in requires(name) or () if "extra ==" not in line]
            waiting += [_plain(match[0]) for line in lines if (match := re.match(r"[A-Za-z0-9._-]+", line))]
    return frozenset(found)


def _plain(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
