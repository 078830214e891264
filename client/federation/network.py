"""The experiment's network at a site, with the weights that a message brings."""

from __future__ import annotations

from functools import lru_cache

from torch import nn

from pneumofed.client.federation.fedbn import LocalNorms
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig, TaskName
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout


def network_with(experiment: ExperimentConfig, arrays: ModelArrays) -> tuple[nn.Module, ArraysLayout]:
    """Loads weights into the network of the experiment, which is one and the same object for every call.

    Args:
        experiment: names the network.
        arrays: its weights and statistics.

    Returns:
        The network on the CPU, and the layout of its arrays.

    Raises:
        MessageError: they are of another network.
    """
    model = empty_network(experiment.model, experiment.task)
    layout = ArraysLayout.of(model)
    layout.load(model, arrays.parameters, arrays.statistics)
    return model, layout


def own_network(instruction: Instruction, config: SiteConfig, norms_before_round: int) -> tuple[nn.Module, ArraysLayout]:
    """Loads the instruction's weights, under FedBN with the site's own norm layers of an earlier round; see `network_with`.

    Args:
        instruction: with the global weights.
        config: the site's own.
        norms_before_round: only norm layers of earlier rounds are taken.

    Raises:
        MessageError: the weights are none, or of another network.
    """
    experiment, arrays = instruction.experiment, instruction.weights
    if experiment.strategy.name == "fedbn":
        layout = ArraysLayout.of(empty_network(experiment.model, experiment.task))
        arrays = LocalNorms.of(config.work_dir, instruction.run, layout).restore(arrays, norms_before_round)
    return network_with(experiment, arrays)


@lru_cache(maxsize=1)
def empty_network(cfg: ModelConfig, task: TaskName) -> nn.Module:
    """Builds the network without its first weights, which come with each message; kept for the process, since building it costs 0.2 s.

    Args:
        cfg: the network.
        task: decides the number of classes.
    """
    return build_model(cfg.without_weights(), task, seed=0)
