"""Ditto (Li, Hu, Beirami and Smith 2021, algorithm 1): beside its part in the global model w, a site trains a model v of its own.

    models = PersonalModels.of(work_dir, run)
    start  = models.before(round)         v after the site's last earlier round; None before its first
    v      = train_personal(start, ...)   steps toward the minimum of loss(v) + lambda / 2 * ||v - w||^2, from `start`, else from w
    models.keep(v)                        a file a round, the last three

Nothing of v is in any message but its statistics on validation patients, under the rules of the global model's; a site's update is what it
is without v. So v is trained in plain steps in private runs too, and the ledger counts none of them: what nobody outside sees needs no
noise. Its statistics depend on training images without noise; see `Disclosure.shows_personal`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from pneumofed.client.federation.site_data import SiteData, class_number
from pneumofed.client.federation.training import RoundPlan, build_setup, choose_examples, pull_toward, train_locally
from pneumofed.common.config.experiment import ExperimentConfig, PrivacyConfig, StrategyConfig
from pneumofed.common.config.reader import experiment_from_json
from pneumofed.common.errors import ConfigError, DataError, MessageError
from pneumofed.common.files import StateFile
from pneumofed.common.models.build import build_empty
from pneumofed.common.models.compute import Compute
from pneumofed.common.wire.fields import run_token
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout

FOLDER = "personal"
KEPT_ROUNDS = 3
"""A coordinator whose last checkpoint is damaged repeats two rounds."""


@dataclass(frozen=True)
class PersonalModel:
    """The site's own model of a run after one of its rounds; `first_round` is the one in which it began from the global weights."""

    experiment: ExperimentConfig
    run: str
    round: int
    first_round: int
    arrays: ModelArrays


@dataclass(frozen=True)
class PersonalModels:
    """The site's own models of one run, as files in its work folder."""

    folder: Path

    @classmethod
    def of(cls, work_dir: str | Path, run: str) -> PersonalModels:
        """Opens the models of a run; nothing is made on the disk.

        Args:
            work_dir: the site's own folder.
            run: the run's token.

        Raises:
            MessageError: `run` is no token, and so no name of a folder.
        """
        return cls(Path(work_dir) / FOLDER / run_token(run))

    def before(self, round_number: int) -> PersonalModel | None:
        """Reads the model of the last round before `round_number`, so that a repeated round starts as it did; None before the first.

        Raises:
            DataError: the file is damaged, or the round is so far back that its model is no longer kept.
        """
        kept = self._rounds()
        earlier = [number for number in kept if number < round_number]
        if earlier:
            return self._file(earlier[-1]).read()
        later = self._file(kept[0]).read() if kept else None
        if later is not None and later.first_round < round_number:
            raise DataError(
                f"{self.folder} holds the site's own model from round {kept[0]} on, and round {round_number} needs an earlier one: "
                f"only {KEPT_ROUNDS} are kept; restore the folder from a backup, or remove it to begin again from the global model"
            )
        return None

    def last(self) -> PersonalModel | None:
        """Reads the model of the last round; None where there is none.

        Raises:
            DataError: its file is damaged.
        """
        kept = self._rounds()
        return self._file(kept[-1]).read() if kept else None

    def keep(self, model: PersonalModel) -> None:
        """Keeps the model of a round; those of later rounds, which a broken-off run left, and those before the last three are removed.

        Raises:
            OSError: the folder cannot be written, or the disk is full; earlier models are as they were.
        """
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in self._rounds():
            if number > model.round:
                self._file(number).remove()
        self._file(model.round).write(model)
        for number in self._rounds()[:-KEPT_ROUNDS]:
            self._file(number).remove()

    def _rounds(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.npz"))

    def _file(self, number: int) -> StateFile[PersonalModel | None]:
        return StateFile(
            self.folder / f"round-{number:05d}.npz",
            kind="the site's own model of a run",
            parse=_parse,
            missing=None,
            remedy=f"restore it from a backup, or remove {self.folder} to begin again from the global model",
            refuse=DataError,
            dump=_dump,
        )


def find_personal_run(work_dir: Path, name: str) -> PersonalModel:
    """Finds the site's own model of a run, as it is after its last round.

    Args:
        work_dir: the site's own folder.
        name: the run's token or the first digits of it, or the name of its experiment; empty where there is only one run.

    Raises:
        ConfigError: none or several runs fit; names those that there are.
        DataError: a file is damaged.
    """
    folders = sorted(path for path in (work_dir / FOLDER).glob("*") if path.is_dir())
    known = [model for folder in folders if (model := PersonalModels(folder).last()) is not None]
    found = [model for model in known if model.run.startswith(name) or model.experiment.name == name]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{model.run} ({model.experiment.name}, round {model.round})" for model in known) or "none"
    what = f"{len(found)} runs fit {name!r}" if name else "no run is named"
    raise ConfigError(f"{what}; runs with a model of this site's own (personal.method) are: {listed}")


def prepare_personal(instruction: Instruction, site: SiteData, model: nn.Module, compute: Compute) -> Callable[[], None]:
    """Makes ready for the site's own model of this round; a damaged file is refused here, before a private round spends anything.

    Args:
        instruction: what the coordinator asks.
        site: the site's data.
        model: with the weights that the site's part in the global round starts from; they are copied.
        compute: device and precision.

    Returns:
        Trains the own model and keeps it; does nothing in a run without one.

    Raises:
        DataError: the file of the round before is damaged, or no longer kept.
    """
    if not instruction.experiment.personal.is_on:
        return lambda: None
    models = PersonalModels.of(site.config.work_dir, instruction.run)
    start, base = models.before(instruction.round), ModelArrays(*ArraysLayout.of(model).flatten(model))
    return lambda: models.keep(train_personal(start, instruction, base, site, compute))


def train_personal(
    start: PersonalModel | None, instruction: Instruction, base: ModelArrays, site: SiteData, compute: Compute
) -> PersonalModel:
    """Trains the site's own model for one round, on its training images and by the experiment's optimizer, and returns it.

    Pure in its arguments: a repeated round gives the same bits.

    Args:
        start: the model of an earlier round; None starts from `base`.
        instruction: what the coordinator asks.
        base: the weights that the site's part in the global round starts from, w of algorithm 1; under FedBN with its own norm layers.
        site: the site's data.
        compute: device and precision.

    Raises:
        MessageError: `start` is of another network.
    """
    experiment, number = instruction.experiment, instruction.round
    plan = RoundPlan(plain_experiment(experiment), number, site.name, rate_factor=instruction.rate_factor)
    model = build_empty(experiment.model, experiment.task)
    layout = ArraysLayout.of(model)
    layout.load(model, base.parameters, base.statistics)
    setup = build_setup(model, site.class_counts(class_number(experiment)), plan, compute)
    if experiment.personal.proximal_lambda > 0:
        copies = [parameter.detach().clone() for group in setup.optimizer.param_groups for parameter in group["params"]]
        pull_toward(setup.optimizer, copies, experiment.personal.proximal_lambda)
    if start is not None:
        _check_network(start, layout)
        layout.load(setup.model, start.arrays.parameters, start.arrays.statistics)
    train_locally(setup, choose_examples(setup.model, site.train, plan, compute, site.cache_dir), plan)
    first = number if start is None else start.first_round
    return PersonalModel(experiment, instruction.run, number, first, ModelArrays(*layout.flatten(setup.model)))


def plain_experiment(experiment: ExperimentConfig) -> ExperimentConfig:
    """Copies the experiment with what trains the site's own model: no strategy's or FedProx's correction, no noise, and its own passes."""
    passes = {"local_epochs": epochs, "local_steps": None} if (epochs := experiment.personal.epochs) else {}
    training = experiment.training.model_copy(update={"proximal_mu": 0.0, **passes})
    changes = {"training": training, "strategy": StrategyConfig(), "privacy": PrivacyConfig()}
    return experiment.model_copy(update=changes)


def _check_network(model: PersonalModel, layout: ArraysLayout) -> None:
    if (len(model.arrays.parameters), len(model.arrays.statistics)) != (layout.parameter_count, layout.statistic_count):
        raise MessageError("the run had another network in an earlier round; a run keeps its network")


def _dump(model: PersonalModel | None) -> bytes:
    assert model is not None  # `missing` is never written
    facts = {"run": model.run, "round": model.round, "first_round": model.first_round}
    text = json.dumps({**facts, "experiment": model.experiment.model_dump_json()}).encode()
    file = io.BytesIO()
    np.savez(file, facts=np.frombuffer(text, np.uint8), parameters=model.arrays.parameters, statistics=model.arrays.statistics)
    return file.getvalue()


def _parse(content: bytes) -> PersonalModel:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            arrays = ModelArrays(file["parameters"], file["statistics"])
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    experiment = experiment_from_json(facts["experiment"])
    return PersonalModel(experiment, facts["run"], facts["round"], facts["first_round"], arrays)
