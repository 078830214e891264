"""CT volumes: federated against pooled AUROC on phantoms, and seconds and memory of a volume in training and prediction.

    python -m benchmarks.ct_volumes [--patients 160] [--rounds 8] [--hospitals 3] [--image-size 64] [--slices 32]
                                    [--networks resnet18_slices densenet121_3d] [--costs-only]

Each network is trained by hospitals among which drawn patients are dealt out, and once on all of their patients together, by the recipe of
configs/ct.yaml; both are judged on the same held-out patients, with 95 % intervals by bootstrap. Costs are of one core: a volume's share of
a training step of `--batch` volumes, and one volume through ONNX Runtime; memory is what the process's
peak grew by (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")
TIMED = 5


def main() -> None:
    options = _options()
    print(json.dumps(vars(options)), flush=True)
    for network in options.networks:
        if not options.costs_only:
            print(json.dumps({"network": network, **train(network, options)}), flush=True)
        for norm in ("batch", "group"):
            for measure in (training_cost, prediction_cost) if norm == "batch" else (training_cost,):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a peak is of the whole process
                    found = pool.submit(measure, network, norm, options.image_size, options.slices, options.batch).result()
                print(json.dumps({"network": network, "norm": norm, **found}), flush=True)


def train(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a federation and the pooled baseline; returns test AUROC of both, with intervals.

    Args:
        network: its name.
        options: patients, hospitals, rounds, size and seed.
    """
    from pneumofed.server.runs.summary_records import BaselineResult
    from pneumofed.simulation.baselines import BaselineJob, run_job
    from pneumofed.simulation.hospitals.federation import lay_out
    from pneumofed.simulation.plan import SimulationRequest, plan_simulation
    from pneumofed.simulation.runner import run_simulation

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "image": {"slices": options.slices, "size_px": options.image_size},
            "evaluation": {"every_rounds": options.rounds},
        }
        request = SimulationRequest(
            config=Path("ct"),
            model=network,
            rounds=options.rounds,
            phantoms=options.patients,
            hospitals=options.hospitals,
            partition="dirichlet",
            alpha=1.0,
            seed=options.seed,
            settings=settings,
            engine="local",
            workers=1,
            out=Path(folder) / "run",
        )
        plan = plan_simulation(request)
        started = time.perf_counter()
        summary = run_simulation(plan, lambda _: None)
        seconds = time.perf_counter() - started
        federation = lay_out(plan.simulation, plan.experiment, plan.run_dir, resume=True)
        (Path(folder) / "pooled").mkdir()
        files = tuple(map(str, federation.site_files))
        job = BaselineJob(
            "pooled", files, str(federation.coordinator_file), plan.experiment.model_dump_json(), str(Path(folder) / "pooled")
        )
        run_job(job)
        pooled = BaselineResult.model_validate_json(job.result.read_bytes())
        sets = {
            name: {"federated": _interval(summary.results[name]), "pooled": _interval(getattr(pooled, name))}
            for name in summary.results
        }
        return {"auroc": sets, "federation_sec": round(seconds)}


def _interval(results: Any) -> str:
    found = results["auroc"]
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def training_cost(network: str, norm: str, size_px: int, slices: int, batch: int) -> dict[str, Any]:
    """Measures one step of a batch of volumes; runs in a process of its own.

    Args:
        network: its name.
        norm: `batch` or `group`.
        size_px, slices: of a volume.
        batch: volumes of the step.
    """
    import torch

    from pneumofed.common.config.experiment import ModelConfig
    from pneumofed.common.models.build import build_model
    from pneumofed.common.models.compute import build_compute

    compute = build_compute("cpu", "fp32", threads=1)
    model = compute.place(build_model(ModelConfig(name=network, norm=norm), "binary", 0)).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    volumes, labels = compute.move(torch.rand(batch, 1, slices, size_px, size_px)), torch.arange(batch) % 2

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(volumes), labels).backward()
        optimizer.step()

    before = _peak_mib()
    step()  # weights, their gradients and moments are counted with it
    seconds = _median_seconds(step)
    return {
        "part": "training",
        "batch": batch,
        "sec_a_volume": round(seconds / batch, 3),
        "peak_mib": round(_peak_mib() - before),
    }


def prediction_cost(network: str, norm: str, size_px: int, slices: int, _: int) -> dict[str, Any]:
    """Measures one volume through the exported graph; runs in a process of its own.

    Args:
        network: its name.
        norm: `batch` or `group`.
        size_px, slices: of a volume.
    """
    from pneumofed.common.config.experiment import ModelConfig
    from pneumofed.common.models.build import build_model
    from pneumofed.server.export.graph import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model = build_model(ModelConfig(name=network, norm=norm), "binary", 0)  # type: ignore[arg-type]
        export_onnx(model, 1, (slices, size_px, size_px), path)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # the exporter's memory is not the prediction's
            found: dict[str, Any] = pool.submit(_run_graph, path.read_bytes(), size_px, slices).result()
    return found


def _run_graph(graph: bytes, size_px: int, slices: int) -> dict[str, Any]:
    from pneumofed.common.model_bundle.predictor import open_session

    before = _peak_mib()
    session = open_session(graph, threads=1)
    volume = np.random.default_rng(0).random((1, 1, slices, size_px, size_px), np.float32)
    seconds = _median_seconds(lambda: session.run(None, {"image": volume}))
    return {"part": "prediction", "sec_a_volume": round(seconds, 3), "peak_mib": round(_peak_mib() - before)}


def _median_seconds(work: Any) -> float:
    found = []
    for _ in range(TIMED):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return float(np.median(found))


def _peak_mib() -> float:
    """Of this process's memory; the peak of `getrusage` would be that of the process which started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--hospitals", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", nargs="+", default=["resnet18_slices", "densenet121_3d"])
    parser.add_argument("--costs-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
