"""Building a network and choosing what of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from common.architectures import architecture_of, build_architecture
from common.config import ModelConfig
from common.config_types import TaskName
from common.data.manifest import CLASSES
from common.weights import load_weights

Freeze = Literal["none", "head_only", "last_block"]


def build_model(cfg: ModelConfig, task: TaskName, seed: int, *, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network of `cfg`: normalised float32 [N, in_channels, S, S], S at least 32, -> logits [N, classes]; class 0 is normal.

    Random weights are pure in `seed`, and torch's global generators are left as they were. No operation of the network works in
    place. All parameters are trainable; see `set_trainable`.

    Args:
        cfg: the network, its input and its first weights. A site, which gets them from the coordinator, sets `weights` to `none`.
        task: decides the number of classes.
        seed: of the random weights.
        weights: the first weights where the caller has read them already, as `common.model_bundle.start.read_start_weights` does.

    Raises:
        WeightsError: `cfg.weights` cannot be had or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds the generators of all GPUs.
        torch.default_generator.manual_seed(seed)
        model = build_architecture(cfg, len(CLASSES[task]))
    if cfg.weights != "none":
        load_weights(model, cfg, weights)
    return model


def set_trainable(model: nn.Module, freeze: Freeze) -> tuple[str, ...]:
    """Sets `requires_grad` of every parameter of a network of `build_model`; returns the names of the trainable ones, in order.

    `none` trains everything, `head_only` the classifier, `last_block` the classifier and the last block of convolutions. Call
    `train_mode` afterwards.
    """
    trained = _trained_modules(model, freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(freeze == "none" or name.startswith(trained))
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def train_mode(model: nn.Module, *, fix_statistics: bool = False) -> None:
    """`model.train()`, but a BatchNorm with frozen parameters stays in evaluation: its running statistics do not move either.

    With `fix_statistics` every BatchNorm stays in evaluation; its parameters are trained all the same.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (fix_statistics or not _is_trainable(module)):
            module.eval()


def classifier_of(model: nn.Module) -> nn.Linear:
    """The last linear layer of a network of `build_model`: features -> logits."""
    classifier = model.get_submodule(architecture_of(model).head)
    if not isinstance(classifier, nn.Linear):
        raise TypeError(f"{architecture_of(model).head}: expected a linear layer, got {type(classifier).__name__}")
    return classifier


def freeze_in_round(cfg: ModelConfig, round: int) -> tuple[Freeze, float]:
    """What is frozen in a round, counted from 1, and the factor on the learning rate.

    The first `cfg.head_first_rounds` rounds train the new classifier alone at the full rate, so that its random weights do not
    spoil the features below; then follows `cfg.freeze` at `cfg.fine_tune_factor`. Without such rounds the factor is 1.
    """
    if cfg.head_first_rounds == 0:
        return cfg.freeze, 1.0
    return ("head_only", 1.0) if round <= cfg.head_first_rounds else (cfg.freeze, cfg.fine_tune_factor)


def _trained_modules(model: nn.Module, freeze: Freeze) -> tuple[str, ...]:
    architecture = architecture_of(model)
    modules = (architecture.head, *architecture.last_block) if freeze == "last_block" else (architecture.head,)
    return tuple(f"{name}." for name in modules)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
