"""The time of a private step against a plain one on the same network, side by side in one process.

    python -m benchmarks.private_step [--models resnet18 small_cnn] [--size 128] [--batch 32] [--repeats 7]
    python -m benchmarks.private_step --against ../former      # another checkout's private step, in place of Opacus' and the plain one

Each repeat takes one step of every kind, in turn, so that a busy machine slows all alike; the ratio is the median over repeats of
private / plain. `ours` is a whole step of `pneumofed.client.privacy.dp_sgd` on a full batch: clipped gradients, noise, optimizer.
`opacus` is Opacus' GradSampleModule (per-sample gradients in memory, by hooks) and DPOptimizer. All kinds run AdamW, one thread.

Against another checkout each side has a process, which takes a step when it is told to, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from pneumofed.client.federation.training import RoundPlan, TrainingSetup, build_setup
from pneumofed.client.privacy.dp_sgd import PrivateRound, build_private_setup
from pneumofed.client.privacy.plan import SitePlan
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.server.runs.folder import describe_environment


def experiment_of(options: argparse.Namespace, model: str) -> ExperimentConfig:
    return build_config(
        ExperimentConfig,
        {
            "image": {"size_px": options.size},
            "model": {"name": model, "norm": "group", "weight_standardization": options.standardized},
            "loss": {"logit_adjustment": False},
            "privacy": {
                "mechanism": "dp_sgd",
                "noise_multiplier": 1.0,
                "expected_batch_size": options.batch,
                "secure_noise": options.secure_noise,
            },
        },
    )


def build_step(kind: str, experiment: ExperimentConfig, compute: Compute) -> Callable[[], None]:
    """One whole step on a batch of random images that are made once; augmentation is left out of both sides."""
    plan, size, batch = RoundPlan(experiment, 1, "site"), experiment.image.size_px, experiment.privacy.expected_batch_size
    model = build_model(experiment.model, experiment.task, seed=0)
    inputs, labels = compute.move(torch.randn(batch, 1, size, size)), torch.arange(batch) % 2
    if kind == "opacus":
        return opacus_step(build_setup(model, [1, 1], plan, compute), inputs, labels)
    if kind == "plain":
        setup = build_setup(model, [1, 1], plan, compute)
    else:
        private = PrivateRound(SitePlan.of(experiment, 10 * batch, 10 * batch), bytes(32), float(batch))
        setup = build_private_setup(model, private, plan, compute)
    setup.model.train()

    def step() -> None:
        setup.optimizer.zero_grad(set_to_none=True)
        setup.rule.add_gradient(lambda: loss_of(setup, setup.model, inputs, labels), batch)
        setup.rule.take_step()

    return step


def opacus_step(setup: TrainingSetup, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    model = GradSampleModule(setup.model.train())
    optimizer = DPOptimizer(setup.optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(labels))

    def step() -> None:
        optimizer.zero_grad()
        loss_of(setup, model, inputs, labels).backward()
        optimizer.step()

    return step


def loss_of(setup: TrainingSetup, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with setup.compute.autocast():
        logits = model(inputs)
    loss: torch.Tensor = setup.loss(logits.float(), labels)
    return loss


def measure(steps: dict[str, Callable[[], None]], repeats: int, *, warm: bool = False) -> dict[str, list[float]]:
    """CPU seconds of each step, kinds in turn; CPU time and not the wall clock's, which other processes lengthen."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for repeat in range(int(warm), repeats + 1):
        for kind, step in steps.items():
            started = time.process_time()
            step()
            if repeat:  # the first makes buffers and compiles kernels
                seconds[kind].append(time.process_time() - started)
    return seconds


def serve(options: argparse.Namespace) -> None:
    """Takes a private step for each line on standard input and prints its CPU seconds."""
    compute: Any = build_compute("cpu", options.precisions[0], threads=1)
    step = build_step("ours", experiment_of(options, options.models[0]), compute)
    for _ in sys.stdin:
        print(measure({"ours": step}, 1, warm=True)["ours"][0], flush=True)


@contextmanager
def server(checkout: Path | None, options: argparse.Namespace, model: str, precision: str) -> Iterator[Callable[[], float]]:
    """A process with the code in `checkout`, or the installed one, and a function that has it take a step and returns its seconds."""
    told = ["--serve", "--models", model, "--precisions", precision, "--size", str(options.size), "--batch", str(options.batch)]
    flags = [flag for flag in ("--standardized", "--secure-noise") if getattr(options, flag[2:].replace("-", "_"))]
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = others | ({"PYTHONPATH": str(checkout.resolve())} if checkout else {})
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *told, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def step() -> float:
        stdin.write("\n")
        stdin.flush()
        return float(stdout.readline())

    try:
        step()  # makes buffers and compiles kernels
        yield step
    finally:
        stdin.close()
        process.wait()


def compare(options: argparse.Namespace, model: str, precision: str) -> None:
    """Prints the seconds of a private step of both checkouts, and the median ratio of steps that came one after the other."""
    with (
        server(None, options, model, precision) as ours,
        server(options.against, options, model, precision) as other,
    ):
        pairs = [(ours(), other()) for _ in range(options.repeats)]
    seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    print(f"{model:12} {precision}  {seconds[0]:7.3f} s, against {seconds[1]:7.3f} s: {ratio:5.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", default=["resnet18", "small_cnn"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--standardized", action="store_true", help="with weight standardisation, on both sides")
    parser.add_argument("--secure-noise", action="store_true")
    parser.add_argument("--without-opacus", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="of another version: compares the two private steps")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    kinds = ["plain", "ours"] + ([] if options.without_opacus or options.standardized else ["opacus"])
    print(json.dumps({"options": vars(options), "environment": describe_environment()}, default=str))
    for model in options.models:
        for precision in options.precisions:
            if options.against:
                compare(options, model, precision)
                continue
            compute: Any = build_compute("cpu", precision, threads=1)
            experiment = experiment_of(options, model)
            seconds = measure({kind: build_step(kind, experiment, compute) for kind in kinds}, options.repeats)
            plain = seconds["plain"]
            for kind in kinds:
                ratio = statistics.median(mine / other for mine, other in zip(seconds[kind], plain, strict=True))
                print(
                    f"{model:12} {precision}  {kind:7} {statistics.median(seconds[kind]):7.3f} s  {ratio:5.2f} x plain",
                    flush=True,
                )


if __name__ == "__main__":
    main()
