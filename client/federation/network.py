"""The experiment's network at a site, with the weights that a message brings, and under FedBN with norm layers of the site's own.

FedBN (Li et al. 2021, algorithm 1): a site keeps its own BatchNorm layers (`LocalNorms`); all other weights are federated. They lie in
the site's folder, one file a round, since a SuperNode that restarts loses what Flower keeps in memory. The site still sends its
normalisation layers, and the coordinator averages them for judging the model centrally; no site ever loads that average.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import nn

from pneumofed.common.config.classes import LabelTask
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.files import atomic_write
from pneumofed.common.models.build import build_empty
from pneumofed.common.wire.fields import run_token
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout


@dataclass(frozen=True)
class LocalNorms:
    """The site's own normalisation layers of one run."""

    folder: Path
    layout: ArraysLayout

    @classmethod
    def of(cls, work_dir: str, run: str, layout: ArraysLayout) -> LocalNorms:
        """Opens the layers that the site keeps of a run; nothing is made on the disk.

        Args:
            work_dir: the site's own folder.
            run: the run's token.
            layout: of the experiment's model; it says which values are of normalisation layers.

        Raises:
            MessageError: `run` is no token, and so no name of a folder.
        """
        return cls(Path(work_dir) / "local_norms" / run_token(run), layout)

    def restore(self, arrays: ModelArrays, before_round: int) -> ModelArrays:
        """Returns `arrays` with the norm layers that the site kept in its last round before `before_round`; unchanged if it has none.

        Args:
            arrays: the coordinator's.
            before_round: a number of a round, from 1; only earlier rounds' layers are taken, so that a repeated round starts
                as it did.

        Raises:
            MessageError: `arrays`, or what was kept in this run, is of another network.
        """
        self.layout.check(arrays.parameters, arrays.statistics)
        kept = [path for path in self._files() if _round_of(path) < before_round]
        if not kept:
            return arrays
        with np.load(kept[-1]) as file:
            own = ModelArrays(file["parameters"], file["statistics"])
        if (len(own.parameters), len(own.statistics)) != (len(self.layout.norm_parameters), len(self.layout.norm_statistics)):
            raise MessageError("the run had another network in an earlier round; a run keeps its network")
        parameters, statistics = arrays.parameters.copy(), arrays.statistics.copy()
        parameters[self.layout.norm_parameters] = own.parameters
        statistics[self.layout.norm_statistics] = own.statistics
        return ModelArrays(parameters, statistics)

    def keep(self, arrays: ModelArrays, round_number: int) -> None:
        """Keeps the norm layers of `arrays` as those of `round_number`; what a broken-off later round left is removed.

        Args:
            arrays: the site's, after training.
            round_number: from 1.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._files():
            if _round_of(path) > round_number:
                path.unlink()
        own = {
            "parameters": arrays.parameters[self.layout.norm_parameters],
            "statistics": arrays.statistics[self.layout.norm_statistics],
        }
        with atomic_write(self.folder / f"round-{round_number:05d}.npz", synced=True) as file:
            np.savez(file, **own)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.npz"))


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


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
def empty_network(cfg: ModelConfig, task: LabelTask) -> nn.Module:
    """Builds the network without its first weights, which come with each message; kept for the process, which in a simulation answers many.

    Args:
        cfg: the network.
        task: decides the number of classes.
    """
    return build_empty(cfg, task)
