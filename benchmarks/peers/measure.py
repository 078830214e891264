"""Runs one system once, and measures its command from outside: seconds, optimizer steps, memory of all its processes, bytes, result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.peers.prepare import SET, TABLE, TEST, VALIDATION_FRACTION
from benchmarks.peers.table import NVFLARE_SYSTEMS, Turn, later_round
from benchmarks.peers.work import BYTES_FILE, FINAL_FILE, RESULT_FILE, Recipe, State, Work, first_network, state_of
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.processes import descendants, stop_group
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.runs.checkpoints import read_last
from pneumofed.server.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).resolve().with_name("probe")
SHARED_MEMORY = Path("/dev/shm")
SAMPLE_EVERY_SEC = 0.5
STEPS_FILE, LOG_FILE, RUN = "steps.txt", "output.log", "run"


@dataclass(frozen=True)
class Systems:
    """How each system is started.

    Attributes:
        work: what is done.
        nvflare_python: a Python that has NVFlare and torch; None where it is not measured.
        timeout_sec: after which a system is ended and the benchmark with it.
    """

    work: Work
    nvflare_python: Path | None
    timeout_sec: float

    def command(self, system: str, turn: Path) -> list[str]:
        """Returns the command line of a turn.

        Args:
            system: a key of `table.SYSTEMS`.
            turn: its folder.
        """
        places, parallel = [str(self.work.folder), str(turn)], self.work.recipe.parallel
        if system.startswith("bare"):
            return [sys.executable, "-m", "benchmarks.peers.bare", *places, str(1 if system == "bare-1" else parallel)]
        if system == "flower":
            return [sys.executable, "-m", "benchmarks.peers.flower_run", *places]
        if system in NVFLARE_SYSTEMS:
            threads = parallel if system == "nvflare" else len(self.work.hospitals)
            return [str(self.nvflare_python), "-m", "benchmarks.peers.nvflare_run", *places, str(threads)]
        engine = system.removeprefix("pneumofed-")
        workers = ["--workers", str(parallel)] if engine == "local" else []
        return [*pneumofed_command(self.work, turn / RUN), "--engine", engine, *workers]

    def measure(self, system: str, hospitals_turn: int, folder: Path, base: State | None) -> Turn:
        """Runs a system and returns what was measured; its log and results stay in `folder`.

        Args:
            system: a key of `table.SYSTEMS`.
            hospitals_turn: number of the turn, from 1.
            folder: is made.
            base: final weights of the bare loop, to compare with.

        Raises:
            SystemExit: it failed or took too long; the end of its output is shown.
        """
        folder.mkdir(parents=True)
        started, peak = time.time(), 0.0
        before = _shared_memory()
        with children_end_with_me(), (folder / LOG_FILE).open("wb") as output:
            process = subprocess.Popen(
                self.command(system, folder), cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.time() - started < self.timeout_sec:
                    sampled = time.perf_counter()
                    peak = max(peak, memory_bytes({process.pid, *descendants(process.pid)}, _shared_memory() - before))
                    cost = time.perf_counter() - sampled  # sampling shall take no more than a tenth of a core
                    _wait(process, max(SAMPLE_EVERY_SEC, 9 * cost))
                wall = time.time() - started
            finally:
                late = process.poll() is None
                stop_group(process)
        if late or process.returncode:
            said = (folder / LOG_FILE).read_text(errors="replace")[-3000:]
            end = f"did not end within {self.timeout_sec:g} s" if late else f"ended with {process.returncode}"
            raise SystemExit(f"{said}\n{system} {end}; its files are in {folder}")
        down, up, auroc, final = self._results(system, folder)
        steps = sorted(map(float, (folder / STEPS_FILE).read_text().split()))
        seconds = later_round(steps, self.work.steps_a_round)
        difference = None if base is None else largest_difference(base, final)
        numbers = [steps[0] - started, seconds, started + wall - steps[-1], peak, down, up, auroc, difference]
        return Turn(system, len(self.work.hospitals), hospitals_turn, self.work.recipe.parallel, wall, *numbers)  # type: ignore[arg-type]

    def _results(self, system: str, folder: Path) -> tuple[float | None, float | None, float, State]:
        if system.startswith("pneumofed"):
            return pneumofed_results(self.work, folder / RUN)
        final: State = torch.load(folder / FINAL_FILE, weights_only=True)
        down = up = None
        if (folder / BYTES_FILE).exists():
            lines = [line.split() for line in (folder / BYTES_FILE).read_text().splitlines()]
            shares = len(self.work.hospitals) * self.work.recipe.rounds
            down, up = (sum(int(line[column]) for line in lines) / shares for column in (0, 1))
        return down, up, float(json.loads((folder / RESULT_FILE).read_text())["auroc"]), final


def environment(folder: Path) -> dict[str, str]:
    """Returns the variables of every system: one thread, the probe, and this checkout first on Python's path.

    Args:
        folder: of the turn.
    """
    path = os.pathsep.join(filter(None, [str(PROBE), str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": path, "PEERS_STEPS": str(folder / STEPS_FILE), "PYTHONUNBUFFERED": "1"}


def pneumofed_command(work: Work, run: Path) -> list[str]:
    """Returns the command line of pneumofed for the same work, without its engine.

    Args:
        work: what is done.
        run: run folder.
    """
    command = [sys.executable, "-m", "pneumofed.cli.main", "simulate", "--data", str(work.folder / SET / TABLE)]
    command += ["--partition", "column:hospital", "--external", str(work.folder / TEST / TABLE), "--out", str(run)]
    return command + [part for setting in pneumofed_settings(work.recipe) for part in ("--set", setting)]


def pneumofed_settings(recipe: Recipe) -> list[str]:
    """Lists what differs from pneumofed's defaults: plain SGD on plain images, and judged on the test set at the end only."""
    plain = ["rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast", "noise_std"]
    return [
        f"rounds={recipe.rounds}",
        f"seed={recipe.seed}",
        f"image.size_px={recipe.size_px}",
        f"model.name={recipe.model}",
        "training.optimizer=sgd",
        f"training.learning_rate={recipe.learning_rate!r}",
        f"training.momentum={recipe.momentum!r}",
        "training.weight_decay=0.0",
        f"training.batch_size={recipe.batch_size}",
        "training.local_epochs=1",
        "training.schedule=constant",
        "training.precision=fp32",
        f"training.validation_fraction={VALIDATION_FRACTION!r}",
        "loss.label_smoothing=0.0",
        "loss.logit_adjustment=false",
        f"evaluation.every_rounds={recipe.rounds}",
        "evaluation.bootstrap_samples=0",
        *(f"augmentation.{name}=0.0" for name in plain),
    ]


def pneumofed_results(work: Work, run: Path) -> tuple[float, float, float, State]:
    """Reads a run folder.

    Args:
        work: what was done.
        run: the folder.

    Returns:
        Bytes down and up a site and round, the last round's AUROC on the test set, and its weights.

    Raises:
        SystemExit: the run had other images than the work.
    """
    folder = RunFolder(run)
    history, summary = folder.read_history(), folder.read_summary()
    counts = {name: (site.train, site.validation) for name, site in summary.sites.items()}
    expected = sorted((len(one.train), len(one.validation)) for one in work.hospitals)
    if sorted(counts.values()) != expected:
        raise SystemExit(f"{run}: pneumofed had other images than the work: {counts}, expected {expected}")
    shares = len(work.hospitals) * len(history)
    down, up = sum(line.bytes.down for line in history) / shares, sum(line.bytes.up for line in history) / shares
    arrays, network = read_last(folder.last_checkpoint).arrays, first_network(work.recipe)
    ArraysLayout.of(network).load(network, arrays.parameters, arrays.statistics)
    last = history[-1].external
    if last is None or last.auroc is None:
        raise SystemExit(f"{run}: the last round has no AUROC on the test set")
    return down, up, last.auroc, state_of(network)


def largest_difference(one: State, other: State) -> float:
    """Computes the largest difference of a weight between two states of the same network.

    Args:
        one, other: by name of the tensor.
    """
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def memory_bytes(pids: set[int], shared: int) -> float:
    """Sums the memory of processes, pages that several have in parts, and of shared memory that none of them has mapped.

    Args:
        pids: processes; those that have ended count nothing.
        shared: bytes in files of /dev/shm that came with them.
    """
    total = {"Pss": 0, "Pss_Shmem": 0}
    for pid in pids:
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name = line.partition(":")[0]
            if name in total:
                total[name] += int(line.split()[1]) * 1024
    return total["Pss"] - total["Pss_Shmem"] + max(total["Pss_Shmem"], shared)


def _shared_memory() -> int:
    """Bytes in /dev/shm, of all programs: another one that fills it meanwhile would be counted."""
    if not SHARED_MEMORY.is_dir():
        return 0
    found = os.statvfs(SHARED_MEMORY)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
