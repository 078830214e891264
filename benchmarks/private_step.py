"""The time of a private step against a plain one on the same network, side by side in one process.

    python -m benchmarks.private_step [--models resnet18 small_cnn] [--size 128] [--batch 32] [--repeats 7]

Each repeat takes one step of every kind, in turn, so that a busy machine slows all alike; the ratio is the median over repeats of
private / plain. `ours` is a whole step of `pneumofed.client.privacy.dp_sgd` on a full batch: clipped gradients, noise, optimizer.
`opacus` is Opacus' GradSampleModule (per-sample gradients in memory, by hooks) and DPOptimizer. All kinds run AdamW, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
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


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each step, kinds in turn; CPU time and not the wall clock's, which other processes lengthen."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for repeat in range(repeats + 1):
        for kind, step in steps.items():
            started = time.process_time()
            step()
            if repeat:  # the first makes buffers and compiles kernels
                seconds[kind].append(time.process_time() - started)
    return seconds


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
    options = parser.parse_args()
    kinds = ["plain", "ours"] + ([] if options.without_opacus or options.standardized else ["opacus"])
    print(json.dumps({"options": vars(options), "environment": describe_environment()}))
    for model in options.models:
        for precision in options.precisions:
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
