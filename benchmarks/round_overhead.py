"""Wall time of a federated round against the time that the same batches take in a bare PyTorch loop.

    python -m benchmarks.round_overhead --data chest_xray --external external --hospitals 10 --image-size 128 --rounds 3

The bare loop has the same network, optimizer, batch sizes, memory format and number of processes and threads; it trains on batches that
lie ready in memory, without decoding, augmentation, messages, checks, averaging or files, and runs forward over as many batches as the
sites' validation and the central evaluation do. It is timed right after the federated run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.ops.processes import ALLOCATOR_SETTINGS
from pneumofed.server.runs.folder import RunFolder, describe_environment
from pneumofed.simulation.plan import Plan, build_plan
from pneumofed.simulation.runner import run_simulation
from pneumofed.simulation.superlink import Resources


def train_bare(text: str, counts: list[tuple[int, int]]) -> None:
    """Trains on (training images, validation images) of some hospitals, one after the other, on one thread."""
    experiment = ExperimentConfig.model_validate_json(text)
    compute = build_compute("cpu", experiment.training.precision, threads=1)
    model = compute.place(build_model(experiment.model, experiment.task, seed=0))
    for train, validation in counts:
        _train(model, experiment, train, compute)
        _predict(model, experiment, validation, compute)


def _train(model: torch.nn.Module, experiment: ExperimentConfig, images: int, compute: Any) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for size in _sizes(images, experiment.training.batch_size):
        inputs, labels = _batch(experiment, size)
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            logits = model(compute.move(inputs))
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()


@torch.inference_mode()
def _predict(model: torch.nn.Module, experiment: ExperimentConfig, images: int, compute: Any) -> None:
    model.eval()
    for size in _sizes(images, experiment.evaluation.batch_size):
        model(compute.move(_batch(experiment, size)[0]))


def _sizes(images: int, batch: int) -> list[int]:
    return [min(batch, images - start) for start in range(0, images, batch)]


def _batch(experiment: ExperimentConfig, size: int, cache: dict[int, Any] = {}) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: B006
    """One batch of each size, made once: the bare loop shall spend its time in the network alone."""
    if size not in cache:
        side = experiment.image.size_px
        cache[size] = torch.randn(size, experiment.model.in_channels, side, side), torch.arange(size) % 2
    found: tuple[torch.Tensor, torch.Tensor] = cache[size]
    return found


def time_bare(
    experiment: ExperimentConfig, counts: list[tuple[int, int]], central: int, workers: int, repeats: int
) -> list[float]:
    """Seconds of the same batches: hospitals dealt to the least busy of `workers` processes, then the central sets in this one."""
    lots: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
    for pair in sorted(counts, reverse=True):
        min(lots, key=lambda lot: sum(train for train, _ in lot)).append(pair)
    compute = build_compute("cpu", "fp32", threads=workers)
    model = compute.place(build_model(experiment.model, experiment.task, seed=0))
    text, seconds = experiment.model_dump_json(), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(train_bare, [text] * workers, [[(64, 64)]] * workers))  # imports and first calls
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(train_bare, [text] * workers, lots))
            _predict(model, experiment, central, compute)
            seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data")
    parser.add_argument("--external")
    parser.add_argument("--hospitals", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    values = {
        "rounds": options.rounds,
        "seed": options.seed,
        "image": {"size_px": options.image_size},
        "training": {"local_epochs": 1},  # the least work that a round's own costs can hide behind
    }
    virtual = {key: value for key in ("data", "external") if (value := getattr(options, key))} | {"hospitals": options.hospitals}
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name)
        experiment, simulation = build_plan(run_dir, values, virtual)
        resources = Resources(options.hospitals, cpus=options.workers)
        run_simulation(Plan(experiment, simulation, run_dir, resources), print)
        folder = RunFolder(run_dir)
        summary = folder.read_summary()
        counts = [(site.train or 0, site.validation or 0) for site in summary.sites.values()]
        central = sum(report.used or 0 for report in summary.data.values())
        federated = [line.seconds.total or 0.0 for line in folder.read_history()]
    bare = time_bare(experiment, counts, central, options.workers, options.rounds)
    print(
        json.dumps({"options": vars(options), "environment": describe_environment(), "allocator": ALLOCATOR_SETTINGS}, indent=1)
    )
    print("federated round, s:", [round(value, 1) for value in federated], "median", round(statistics.median(federated), 1))
    print("bare loop, s:", [round(value, 1) for value in bare], "median", round(statistics.median(bare), 1))
    print("ratio of medians:", round(statistics.median(federated) / statistics.median(bare), 3))


if __name__ == "__main__":
    main()
