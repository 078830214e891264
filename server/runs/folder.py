"""The folder that every run leaves, the only place where its file names stand, and what its history says about the run's course.

config.yaml        the resolved experiment
study_code/        the study's own network and loss, where it has any
environment.json   versions, machine, git state
history.jsonl      one line a round
heartbeat          touched while a process runs the run
checkpoints/       last.pt and best.pt
validation.json    the hospitals' pooled validation statistics of best.pt, on which an export calibrates
alone.json           how the models of hospitals that trained alone do there beside best.pt, where the experiment asks
cross_site.json      how each hospital's own model does on each hospital's validation patients, where the experiment asks
cross_site/          the hospitals' own models, only as long as they are judged
hospital_reference.json  how the hospitals' validation patients score in the suitability tests of best.pt, where the experiment asks
predictions/       the final model on each central set: test.csv, external.csv
summary.json       status and results, for scripts
report.html        the same for people
figures/           the report's pictures as PNG

`RunFolder` reads and writes them. `best_round`, `stalled` and `with_course` derive the run's course from its history: nothing of it is
stored, so that a resumed run reads the same from the same lines.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pneumofed.common.config.experiment import EarlyStoppingConfig, ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, format_yaml, read_yaml
from pneumofed.common.errors import CheckpointError
from pneumofed.common.evaluation.statistics import MAX_IMAGES, Statistics
from pneumofed.common.files import StateFile, append_whole, write_file
from pneumofed.common.model_bundle.pooled_scores import HospitalReference
from pneumofed.common.models.kept_model import JudgedRound, choose_round
from pneumofed.common.ops.study_code import FOLDER, names_in, remember_folder, study_codes_of, write_codes
from pneumofed.server.runs.records import Metrics, R, RoundRecord, format_record, parse_record
from pneumofed.server.runs.summary_records import AloneComparisons, CrossSiteMatrix, RunBytes, RunSummary, compare_personal

RUN_LOCK, SIMULATION_LOCK = "run", "simulation"
"""Locks of a run folder: of the process that runs the rounds, and of the simulation around it."""
REPORTED_PACKAGES = ("flwr", "torch", "torchvision", "numpy", "scikit-learn", "pydicom", "opacus", "pydantic", "ray")


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def heartbeat(self) -> Path:
        """Touched every few seconds by the process of the run."""
        return self.path / "heartbeat"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def no_resume(self) -> Path:
        """There if the run must not go on: the folder is an older copy, and rounds with the coordinator's noise are missing in it."""
        return self.path / "no-resume"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def report_is_due(self) -> bool:
        """Whether there is a summary, and no report or one that is older; of a run that goes on this says nothing."""
        try:
            written = self.summary.stat().st_mtime_ns
            return self.report.stat().st_mtime_ns < written if self.report.exists() else True
        except OSError:  # never began, or the folder was moved away
            return False

    @property
    def has_succeeded(self) -> bool:
        """Whether the run is over and was judged; nothing that comes later undoes it.

        Raises:
            CheckpointError: the summary is damaged.
        """
        return self.read_summary().status == "succeeded"

    @property
    def holds_run(self) -> bool:
        """Whether no new run may begin here: a checkpoint to go on from lies here, or results or rounds that could be had from none.

        The first round's line comes before its checkpoint. One line by itself is therefore what a process leaves that died, or met a
        full disk, between the two: nothing can go on from it, and a new run writes it again.

        Raises:
            CheckpointError: the summary or the history is damaged.
        """
        return self.last_checkpoint.exists() or self.has_succeeded or len(self.read_history()) > 1

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    @property
    def validation(self) -> Path:
        return self.path / "validation.json"

    @property
    def alone(self) -> Path:
        return self.path / "alone.json"

    @property
    def cross_site(self) -> Path:
        return self.path / "cross_site.json"

    @property
    def own_models(self) -> Path:
        """Folder of the models that hospitals trained alone and gave to be judged; it is there only until they were."""
        return self.path / "cross_site"

    @property
    def hospital_reference(self) -> Path:
        return self.path / "hospital_reference.json"

    @property
    def study_code(self) -> Path:
        """Folder of the study's own network and loss, as the run was started with; most runs have none."""
        return self.path / FOLDER

    def keep_study_code(self, experiment: ExperimentConfig) -> None:
        """Copies the study's own code of the experiment into the run folder.

        Raises:
            ConfigError: this process knows no such code.
        """
        write_codes(self.study_code, study_codes_of(experiment))

    def remember_study_code(self, experiment: ExperimentConfig) -> None:
        """Makes the copies known to this process, where they are what the experiment names."""
        remember_folder(self.study_code, names_in(experiment))

    def predictions(self, name: str) -> Path:
        """Names the file of the final model's predictions on a central set."""
        return self.path / "predictions" / f"{name}.csv"

    def figure(self, name: str) -> Path:
        """Names the file of one of the report's pictures."""
        return self.path / "figures" / f"{name}.png"

    def prepare(self) -> None:
        """Makes the folder and the folders in it; those that are there stay."""
        for folder in (self.path, self.path / "checkpoints", self.path / "predictions"):
            folder.mkdir(parents=True, exist_ok=True)

    def write_config(self, experiment: ExperimentConfig) -> None:
        """Writes the resolved experiment as YAML."""
        write_text(self.config, format_yaml(experiment.model_dump()))

    def read_config(self) -> ExperimentConfig:
        """Reads the experiment.

        Raises:
            ConfigError: the file is missing or wrong.
        """
        return build_config(ExperimentConfig, read_yaml(self.config), str(self.config))

    def read_coordinator(self) -> CoordinatorConfig | None:
        """Reads the coordinator's settings: of a federation they lie in the run folder, of a simulation in `coordinator/`; None without.

        Raises:
            ConfigError: the file is wrong.
        """
        files = (self.path / "coordinator.yaml", self.path / "coordinator" / "coordinator.yaml")
        file = next((file for file in files if file.is_file()), None)
        return build_config(CoordinatorConfig, read_yaml(file), str(file)) if file else None

    def write_environment(self) -> None:
        """Writes what the run runs on."""
        write_text(self.path / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")

    def append_history(self, line: RoundRecord) -> None:
        """Adds one round, the whole line or nothing. Flushed to the disk: a line that is there survives a power cut.

        Raises:
            OSError: the file cannot be written, or the disk is full; it is as it was.
        """
        descriptor = os.open(self.history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)  # as the umask allows
        try:
            append_whole(descriptor, _history_line(line).encode("utf-8"))
        finally:
            os.close(descriptor)

    def read_history(self, after: int = 0, *, sites: bool = True) -> list[RoundRecord]:
        """Reads every complete line; a last line that a crash cut short is left out.

        Args:
            after: how many of the first lines are skipped.
            sites: whether the records have what is known of each site; with a thousand of them nearly all of a line is theirs.

        Raises:
            CheckpointError: a line is of a newer version, or its values are not what they should be.
        """
        lines: list[RoundRecord] = []
        if not self.history.exists():
            return lines
        for number, text in enumerate(self.history.read_text(encoding="utf-8").splitlines(), 1):
            if number <= after:
                continue
            try:
                content = json.loads(text)
            except ValueError:
                break
            if not sites and isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in ("sites", "drawn")}
            lines.append(parse_record(RoundRecord, content, f"line {number} of {self.history}"))
        return lines

    def keep_history_until(self, round_number: int) -> None:
        """Removes what was written after `round_number`, which a resumed run will write again, and a last line that was cut short.

        Args:
            round_number: of the last round that stays; 0 for a run that begins anew.
        """
        if not self.history.exists():
            return
        write_text(self.history, "".join(_history_line(line) for line in self.read_history() if line.round <= round_number))

    def replace_last_line(self, line: RoundRecord) -> None:
        """Writes the last round's line anew, the whole file or nothing.

        Args:
            line: of the round that the last line is of.
        """
        before = self.history.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]
        write_text(self.history, "".join([*before, _history_line(line)]))

    def write_validation(self, round_number: int, statistics: Statistics) -> None:
        """Writes the pooled validation statistics of the round whose model is `best.pt`.

        Args:
            round_number: from 1.
            statistics: summed over the sites.
        """
        write_text(self.validation, json.dumps({"round": round_number, "statistics": statistics.to_numbers()}) + "\n")

    def read_validation(self, classes: int) -> tuple[int, Statistics] | None:
        """Reads the round and its pooled statistics; None where the run kept none, as those before version 0.3.

        Raises:
            CheckpointError: the file is damaged.
        """

        def parse(content: bytes) -> tuple[int, Statistics]:
            values = json.loads(content)
            return int(values["round"]), Statistics.from_numbers(values["statistics"], classes, MAX_IMAGES)

        remedy = "restore it from a backup"
        return StateFile(self.validation, "the validation statistics", parse, None, remedy, CheckpointError).read()

    def write_hospital_reference(self, reference: HospitalReference) -> None:
        """Writes the whole of hospital_reference.json or nothing."""
        write_text(self.hospital_reference, reference.model_dump_json() + "\n")

    def read_hospital_reference(self) -> HospitalReference | None:
        """Reads how the hospitals' patients scored; None where nobody asked them.

        Raises:
            CheckpointError: the file is damaged.
        """
        parse, remedy = HospitalReference.model_validate_json, "restore it from a backup, or remove it to export without"
        return StateFile(self.hospital_reference, "the hospitals' reference", parse, None, remedy, CheckpointError).read()

    def write_alone(self, found: AloneComparisons) -> None:
        """Writes the whole of alone.json or nothing."""
        write_text(self.alone, json.dumps(format_record(found), indent=2, allow_nan=False) + "\n")

    def read_alone(self) -> AloneComparisons | None:
        """Reads how the hospitals' own models do; None where nobody trained alone.

        Raises:
            CheckpointError: the file is damaged.
        """
        return _read_answers(AloneComparisons, self.alone, "the hospitals' own models")

    def write_cross_site(self, found: CrossSiteMatrix) -> None:
        """Writes the whole of cross_site.json or nothing."""
        write_text(self.cross_site, json.dumps(format_record(found), allow_nan=False) + "\n")

    def read_cross_site(self) -> CrossSiteMatrix | None:
        """Reads what the hospitals judged so far; None where none was asked.

        Raises:
            CheckpointError: the file is damaged.
        """
        return _read_answers(CrossSiteMatrix, self.cross_site, "the cross-site evaluation")

    def write_summary(self, summary: RunSummary) -> None:
        """Writes the whole of summary.json or nothing."""
        write_text(self.summary, json.dumps(format_record(summary), indent=2, allow_nan=False) + "\n")

    def read_summary(self) -> RunSummary:
        """Reads the summary; an empty one if there is none yet.

        Raises:
            CheckpointError: the file is damaged, or of a newer version.
        """
        remedy = "restore it or start a new run in another folder"
        file: StateFile[Any] = StateFile(self.summary, "the summary", json.loads, {}, remedy, CheckpointError)
        return parse_record(RunSummary, file.read(), str(self.summary))


def _history_line(line: RoundRecord) -> str:
    return json.dumps(format_record(line), allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes the whole of `text`, as UTF-8, or nothing.

    Args:
        path: an existing file is replaced.
        text: its new content.
    """
    write_file(path, text.encode("utf-8"))


def describe_environment() -> dict[str, Any]:
    """Collects what the run ran on: versions, machine, git commit and whether the working tree was clean."""
    import torch  # here, since reading a run folder needs no torch and importing it costs seconds

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in REPORTED_PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": accelerator,
        "git": _git_state(),
    }


@lru_cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git_state() -> dict[str, Any] | None:
    """Commit of the code and whether it has uncommitted changes; None where the code is no git checkout."""
    source = os.environ.get("PNEUMOFED_SOURCE") or str(Path(__file__).resolve().parent)
    commands = (["git", "-C", source, "rev-parse", "HEAD"], ["git", "-C", source, "status", "--porcelain"])
    try:
        commit, status = (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def validation_auroc(line: RoundRecord) -> float:
    """Reads the round's pooled validation AUROC; -inf where it is undefined, so that any defined one is better."""
    return _judged(line).area


def best_round(history: Sequence[RoundRecord]) -> int:
    """Finds the round whose model is kept, see `common.models.kept_model.choose_round`; 0 without history.

    Test and external results play no part in it.
    """
    return choose_round([_judged(line) for line in history])


def _read_answers(kind: type[R], file: Path, what: str) -> R | None:
    """Reads what hospitals were asked after the rounds; None where there is no file."""
    remedy = "restore it from a backup, or remove it to ask the hospitals again"
    state: StateFile[Any] = StateFile(file, what, json.loads, None, remedy, CheckpointError)
    found = state.read()
    return None if found is None else parse_record(kind, found, str(file))


def standard_error(line: RoundRecord) -> float:
    """Computes the standard error of the round's validation AUROC; 0 where that is undefined or was not counted."""
    return _judged(line).standard_error


def _judged(line: RoundRecord) -> JudgedRound:
    found = line.validation or Metrics()
    positives = found.n_positive or 0
    return JudgedRound(line.round, found.auroc, positives, (found.n or 0) - positives)


def stalled(history: Sequence[RoundRecord], cfg: EarlyStoppingConfig) -> bool:
    """Says whether the last `patience_rounds` validated rounds brought no AUROC above the best before them by `min_delta`.

    Args:
        history: every completed round, in order; those that were not validated do not count.
        cfg: with a patience of 0 no run stops early.
    """
    judged = [line for line in history if line.validation is not None]
    if cfg.patience_rounds == 0 or len(judged) <= cfg.patience_rounds:
        return False
    before, recent = judged[: -cfg.patience_rounds], judged[-cfg.patience_rounds :]
    return max(map(validation_auroc, recent)) < max(map(validation_auroc, before)) + cfg.min_delta


def with_course(summary: RunSummary, history: Sequence[RoundRecord]) -> RunSummary:
    """Completes the summary with what the history shows of the run at any time: rounds completed, the best one, bytes, and the
    hospitals' own models.

    Args:
        summary: of the same run; all else in it stays.
        history: every completed round.
    """
    down, up = (sum(sizes) for sizes in ([line.bytes.down for line in history], [line.bytes.up for line in history]))
    sums = RunBytes(down=down, up=up, total=down + up)
    personal = compare_personal(history, best_round(history))
    found = {"personal": personal} if personal else {}
    return summary.updated(rounds_completed=len(history), best_round=best_round(history), bytes=sums, **found)
