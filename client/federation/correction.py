"""What a site adds to each of its gradients under SCAFFOLD and FedDyn, and keeps in its own folder.

SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II)   adds c - c_i; afterwards c_i moves by (w_global - w_i) / weight - c
FedDyn (Acar et al. 2021, algorithm 1)                       adds -g_i, beside alpha (w - w_global), which is FedProx' pull;
                                                             afterwards g_i moves by -alpha (w_i - w_global)

c_i and g_i are zero at first. One file a round holds what they are should this round's update be counted: whether it was, only the
coordinator knows, who says with the next request which round was counted last. So a round that failed, came too late or is repeated leaves
no trace. w_i are the weights as the coordinator decodes them, so that both sides' sums agree whatever `strategy.update_precision` is.
The values follow from the site's updates, which the coordinator has seen, and never leave the site as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumofed.client.federation.training import TrainingSetup
from pneumofed.common.config.choices import CORRECTED
from pneumofed.common.errors import DataError, MessageError
from pneumofed.common.files import atomic_write
from pneumofed.common.models.recipe import gradient_weight, variate_change
from pneumofed.common.wire.fields import run_token
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.parameter_layout import ArraysLayout

FOLDER = "corrections"
"""In the site's work folder; below it a folder a run."""
_KEPT_FILES = 2
"""Counted rounds whose files stay: a coordinator whose newest checkpoint is damaged goes on from the one before it."""


@dataclass(frozen=True)
class SiteCorrection:
    """The site's correction in one round of a run.

    Attributes:
        folder: of the run at the site.
        instruction: of the round.
        layout: of the experiment's model.
        own: c_i or g_i after the last round that was counted, float32 [P].
    """

    folder: Path
    instruction: Instruction
    layout: ArraysLayout
    own: np.ndarray

    @classmethod
    def read(cls, instruction: Instruction, work_dir: str, layout: ArraysLayout) -> SiteCorrection | None:
        """Reads the site's correction; nothing is made on the disk.

        Args:
            instruction: to train, with the round in which the site's update was last counted.
            work_dir: the site's own folder.
            layout: of the experiment's model.

        Returns:
            None where the strategy has no correction.

        Raises:
            DataError: the file of that round is gone or damaged.
            MessageError: what was sent or kept is of another network.
        """
        if instruction.experiment.strategy.name not in CORRECTED:
            return None
        folder = Path(work_dir) / FOLDER / run_token(instruction.run)
        own = np.zeros(layout.parameter_count, np.float32)
        if instruction.counted:
            try:
                own = np.load(_file(folder, instruction.counted), allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"{_file(folder, instruction.counted)} cannot be read ({type(error).__name__}), and the run cannot go on here without "
                    "it: restore the site's work folder from a backup, or sit this run out"
                ) from error
        for values in (own, instruction.variate):
            if values is not None and (values.dtype != np.float32 or values.shape != (layout.parameter_count,)):
                raise MessageError(f"a correction of {list(values.shape)} where float32 [{layout.parameter_count}] is expected")
        return cls(folder, instruction, layout, own)

    @property
    def added(self) -> np.ndarray:
        """What each gradient of the round gets added, float32 [P]: c - c_i, or -g_i."""
        variate = self.instruction.variate
        return -self.own if variate is None else variate - self.own

    def steer(self, setup: TrainingSetup) -> None:
        """Adds the correction to the gradients before each optimizer step; frozen parameters have none and stay.

        Args:
            setup: of the round's plain training.
        """
        added = self.layout.parameter_tensors(self.added)
        pairs = [(parameter, added[name].to(parameter.device)) for name, parameter in setup.model.named_parameters()]

        def add(*_: Any) -> None:
            for parameter, correction in pairs:
                if parameter.grad is not None:
                    parameter.grad.add_(correction)

        setup.optimizer.register_step_pre_hook(add)

    def keep(self, sent: np.ndarray, images: int) -> None:
        """Keeps what the correction is once this round's update is counted; files of rounds that were not counted are removed.

        Args:
            sent: the site's weights as the coordinator decodes them, float32 [P].
            images: training images that the site states.

        Raises:
            MessageError: the instruction holds no arrays.
        """
        start, experiment = self.instruction.weights, self.instruction.experiment
        if experiment.strategy.name == "scaffold":
            weight = gradient_weight(experiment, self.instruction.round, images, self.instruction.rate_factor)
            change = variate_change(start.parameters, sent, self.instruction.variate, weight)
        else:
            change = -np.float32(experiment.proximal_mu) * (sent - start.parameters)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(_file(self.folder, self.instruction.round), synced=True) as file:
            np.save(file, self.own + change)
        self._clear()

    def _clear(self) -> None:
        numbers = sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.npy"))
        counted = [number for number in numbers if number <= self.instruction.counted]
        for number in {*numbers} - {*counted[-_KEPT_FILES:], self.instruction.round}:
            _file(self.folder, number).unlink()


def _file(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:05d}.npy"
