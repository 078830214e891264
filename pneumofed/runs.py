"""Runs of a federation: `simulate` makes one over virtual hospitals, `open_run` opens what any run has left."""

from __future__ import annotations

import difflib
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never, TypeAlias

import numpy as np

from pneumofed.common.config.choices import StrategyName
from pneumofed.common.config.reader import merge, set_by_path
from pneumofed.common.errors import ArgumentError, ConfigError
from pneumofed.common.ops.study_code import study_code_of
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.tracking.targets import read_targets
from pneumofed.simulation.plan import EngineName, SimulationRequest, plan_simulation

if TYPE_CHECKING:
    from pneumofed.models import ModelBundle


AnyPath: TypeAlias = str | PathLike[str]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A run, in whatever state: what its folder holds, read anew each time it is asked for.

    Attributes:
        folder: absolute.
    """

    folder: Path

    @property
    def status(self) -> str:
        """`succeeded`, `failed`, `stopped` or `running`; `unknown` where the run folder does not say."""
        return str(self.summary.get("status", "unknown"))

    @property
    def summary(self) -> dict[str, Any]:
        """Status and results: what `summary.json` holds."""
        return RunFolder(self.folder).read_summary().to_json()

    @property
    def history(self) -> list[dict[str, Any]]:
        """A flat row for each round, for `pandas.DataFrame(run.history)`: `validation.auroc`, `seconds.total`, ...

        Nested keys are joined by dots; lists stay lists.
        """
        return [flatten(line.to_json()) for line in RunFolder(self.folder).read_history()]

    @property
    def config(self) -> dict[str, Any]:
        """The experiment in full, with every default."""
        return RunFolder(self.folder).read_config().model_dump()

    @property
    def report(self) -> Path:
        """The report for people, HTML in one file."""
        return RunFolder(self.folder).report

    def weights(self) -> dict[str, np.ndarray]:
        """Reads the model of the best round: arrays by name, as in PyTorch's state_dict. Needs torch.

        Raises:
            CheckpointError: the run has kept no model yet.
        """
        import torch

        from pneumofed.server.runs.checkpoints import read_checkpoint

        file = RunFolder(self.folder).best_checkpoint
        folder = RunFolder(self.folder)
        folder.remember_study_code(folder.read_config())
        read_checkpoint(file)  # says in a sentence what is wrong with it
        state = torch.load(file, map_location="cpu", weights_only=True)["model"]
        return {name: tensor.numpy() for name, tensor in state.items()}

    def export(
        self,
        out: AnyPath | None = None,
        *,
        key: AnyPath | None = None,
        reference: Sequence[AnyPath] = (),
        calibration: Literal["none", "temperature", "temperature_and_bias"] = "temperature",
        progress: Say | None = None,
    ) -> ModelBundle:
        """Makes the signed model bundle of the run, as `pneumofed export` does, and opens it. Needs torch.

        Args:
            out: new folder of the bundle; the archive lies beside it. None: `bundle` in the run folder.
            key: private key that signs; None: the coordinator's, made if missing.
            reference: folders of radiographs that take the place of the run's test set as the reference.
            calibration: how probabilities are calibrated.
            progress: takes a sentence about each step, e.g. `print`.

        Raises:
            BundleError: the run did not succeed.
            ConfigError: `out` holds something already, or the key cannot be read.
        """
        from pneumofed.common.wire.keys import read_private_key
        from pneumofed.models import open_bundle
        from pneumofed.server.export.export import ExportPlan, export_run, release_key
        from pneumofed.server.export.source import read_finished_run

        say = progress or _silent
        read_finished_run(self.folder)  # before a key is made in its folder
        signing = read_private_key(Path(key) if key else release_key(self.folder, say))
        folder = Path(out) if out else self.folder / "bundle"
        with _torch_as_it_was():
            export_run(ExportPlan(self.folder, folder, signing, [Path(place) for place in reference], calibration), say)
        return open_bundle(folder)

    def _repr_html_(self) -> str:
        """For notebooks: the results in a line for each set, and a link to the report."""
        rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._facts())
        return f'<table>{rows}</table><a href="{html.escape(self.report.as_uri())}">report</a>'

    def _facts(self) -> list[tuple[str, str]]:
        summary = self.summary
        facts = [("status", self.status), ("rounds", str(summary.get("rounds_completed", 0)))]
        held_out: Mapping[str, Any] = summary.get("held_out") or {}
        for name, results in {"test": summary.get("test"), "external": summary.get("external"), **held_out}.items():
            auroc = (results or {}).get("auroc") or {}
            if auroc.get("value") is not None:
                facts.append((f"AUROC, {name} set", f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})"))
        return [*facts, ("images", "drawn: the numbers say nothing about patients")] if summary.get("phantom") else facts


def open_run(folder: AnyPath) -> Run:
    """Opens the run in `folder`, of a simulation or of real hospitals, whatever state it is in.

    Raises:
        ConfigError: it is no run folder.
    """
    path = Path(folder).absolute()
    if not RunFolder(path).config.exists():
        raise ConfigError(f"{folder} is no run folder: it holds no config.yaml")
    return Run(path)


def simulate(
    data: AnyPath | None = None,
    *,
    external: AnyPath | None = None,
    hospitals: int | None = None,
    sources: Mapping[str, AnyPath] | None = None,
    held_out: Mapping[str, AnyPath] | None = None,
    hold_out: Mapping[str, float] | None = None,
    slow: Mapping[str, float] | None = None,
    partition: str | None = None,
    alpha: float | None = None,
    phantoms: int | None = None,
    model: str | Callable[..., Any] | None = None,
    loss: str | Callable[..., Any] | None = None,
    strategy: StrategyName | None = None,
    rounds: int | None = None,
    image_size: int | None = None,
    seed: int | None = None,
    baselines: bool = False,
    resume: bool = False,
    init: AnyPath | None = None,
    trusted: Sequence[AnyPath] = (),
    out: AnyPath | None = None,
    config: AnyPath | None = None,
    set: Mapping[str, Any] | None = None,
    engine: EngineName | None = None,
    workers: int | None = None,
    threads: int | None = None,
    gpus: float = 0.0,
    ray_address: str | None = None,
    track: str | Sequence[str] = (),
    progress: Say | None = None,
    **unknown: Never,
) -> Run:
    """Trains one model over virtual hospitals on this machine, evaluates it on held-out data and writes a report.

    As `pneumofed simulate`, with the same keys. What is left out is as in `config`, else as the command's default.

    Args:
        data: a set that is dealt to hospitals: a folder (Kaggle layout, NIH, CheXpert or PadChest, DICOM) or a table; None and without
            `sources`: phantoms are drawn.
        external: held-out external set: a folder or table.
        hospitals: number of hospitals that `data` is dealt to (5).
        sources: given hospitals, the place of each one's images by its name; of `NAME:N` they are dealt to N.
        held_out: further held-out sets, the place of each by its name.
        hold_out: share of a given source's patients that is held out under its name; `test` is of `data`.
        slow: by hospital, how many times as long as the others it takes to train, by the virtual clock: `{"hospital-03": 10}`.
        partition: how `data` is dealt: `iid`, `dirichlet`, `quantity`, `scanner`, or `column:NAME` of a table (`dirichlet`).
        alpha: concentration of the Dirichlet draws; small is uneven (0.5).
        phantoms: phantom patients that are drawn without `data` (240).
        model: network: a name of the list, or a study's own, as `"my_net.py:build_net"` or the function or class itself, which must
            stand in a file (`resnet18`); see docs/own-network.md.
        loss: the same for the loss (`cross_entropy`).
        strategy: federated strategy (`fedavg`).
        rounds: number of rounds (12).
        image_size: side of the model's input in pixels (128).
        seed: of everything that is drawn (0).
        baselines: whether to train on pooled images and in each hospital by itself too.
        resume: whether to go on with the run in `out`, or with the newest, after its last completed round.
        init: model bundle that the run goes on from.
        trusted: public keys of coordinators whose bundle `init` may be; empty: any.
        out: run folder; None: `runs/<date>-<time>`.
        config: YAML file with what differs from the defaults.
        set: any key of the experiment, `{"training.learning_rate": 1e-3}`.
        engine: `local`: processes on this machine; `flower`: Flower's simulation on Ray (`local`; with `gpus` or `ray_address`
            `flower`).
        workers: how many hospitals work at once in the local engine; 1: in this process (one a CPU; 1 with a GPU).
        threads: CPU threads of each hospital's training (1).
        gpus: share of a GPU for each hospital, of Flower's engine.
        ray_address: of a running Ray cluster, of Flower's engine.
        track: where the run is tracked beside its folder: `tensorboard`, `tensorboard:FOLDER`, `mlflow:ADDRESS`, or several of them.
        progress: takes a sentence about each step, e.g. `print`.
        unknown: there are no others.

    Raises:
        ConfigError: a key or value is wrong; a misspelt key is answered with the nearest one.
        PneumofedError: the run could not start, or failed; its folder keeps what was done.
    """
    if unknown:
        raise ConfigError(_name_nearest(unknown))
    plan = plan_simulation(
        SimulationRequest(
            data=_path(data),
            external=_path(external),
            hospitals=hospitals,
            sources={name: Path(place) for name, place in (sources or {}).items()},
            held_out={name: Path(place) for name, place in (held_out or {}).items()},
            hold_out=hold_out or {},
            slow=slow or {},
            partition=partition,
            alpha=alpha,
            phantoms=phantoms,
            model=_code(model),
            loss=_code(loss),
            strategy=strategy,
            rounds=rounds,
            image_size=image_size,
            seed=seed,
            baselines=baselines,
            resume=resume,
            init=_path(init),
            trusted=[Path(key) for key in trusted],
            out=_path(out),
            config=_path(config),
            settings=unfold(set or {}),
            engine=engine,
            workers=workers,
            threads=threads,
            gpus=gpus,
            ray_address=ray_address,
            track=read_targets([track] if isinstance(track, str) else track),
        )
    )
    from pneumofed.simulation.runner import run_simulation as run  # torch and Flower, once everything else is known to be right

    with _torch_as_it_was():
        run(plan, progress or _silent)
    return open_run(plan.run_dir)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested `values` into one dictionary with dotted keys.

    Args:
        values: nested mappings; lists stay lists.
        prefix: stands before each key, e.g. `validation.`.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unfold(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nests `values`, whose keys may be dotted, or nested already.

    Raises:
        ArgumentError: it is no mapping.
        ConfigError: a key is a value and a section at once.
    """
    if not isinstance(values, Mapping):
        raise ArgumentError(f"set: expected a dictionary, e.g. {{'training.learning_rate': 1e-3}}, got {type(values).__name__}")
    nested: dict[str, Any] = {}
    for key, value in values.items():
        one: dict[str, Any] = {}
        set_by_path(one, key, value)
        nested = merge(nested, one)
    return nested


def _name_nearest(unknown: Mapping[str, object]) -> str:
    known = [name for name in simulate.__annotations__ if name not in ("unknown", "return")]
    problems = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        problems.append(f"{name}: unknown key; {hint}")
    return "simulate: " + "; ".join(problems) + "; keys of the experiment go into set={'training.learning_rate': 1e-3}"


def _code(given: str | Callable[..., Any] | None) -> str | None:
    return given if given is None or isinstance(given, str) else study_code_of(given).name


def _path(value: AnyPath | None) -> Path | None:
    return None if value is None else Path(value)


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Training in this process sets torch's threads and seeds: the caller's session gets its own back."""
    import torch

    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _silent(_: str) -> None:
    """Says nothing."""
