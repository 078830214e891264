"""Time of a model bundle's judgement on one core, from a file's bytes to the answer, in float32 and int8; and of a folder.

    python -m benchmarks.bundle_latency [--bundle FOLDER] [--images FOLDER] [--repeats 200] [--folder-images 1000]

Without --bundle it measures an untrained ResNet18 of 224 pixels, which takes as long as a trained one. Without --images it draws
phantoms of 512 pixels. Targets: median below 60 ms in float32 and below 30 ms in int8.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image

from pneumofed.common.imaging.images import read_image
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.predictor import Predictor

os.environ.setdefault("OMP_NUM_THREADS", "1")


PRECISIONS: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")


def main() -> None:
    options = _options()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        bundle = load_bundle(options.bundle or write_untrained_bundle(Path(name) / "bundle"), None)
        paths = find_images(options.images, Path(name))
        print(json.dumps({"machine": platform.machine(), "cpu": _cpu(), "model": bundle.manifest.model.name}))
        for precision in PRECISIONS:
            print(json.dumps(measure(bundle, precision, paths, options)), flush=True)


def measure(
    bundle: Bundle, precision: Literal["float32", "int8"], paths: list[Path], options: argparse.Namespace
) -> dict[str, object]:
    """Milliseconds of one image at a time, and images per second of a folder judged together and one at a time."""
    predictor = Predictor(bundle, precision, threads=1)
    for path in paths[:5]:
        predictor.judge([read_image(path)])
    single = np.array([_time_one(predictor, paths[number % len(paths)]) for number in range(options.repeats)])
    folder = [paths[number % len(paths)] for number in range(options.folder_images)]
    return {
        "precision": precision,
        "size_px": bundle.manifest.preprocessing.size_px,
        "median_ms": round(float(np.median(single)), 2),
        "p95_ms": round(float(np.quantile(single, 0.95)), 2),
        "graph_alone_median_ms": round(_time_graph(predictor, options.repeats), 2),
        "folder_images": len(folder),
        "together_per_sec": round(_rate(predictor, folder, at_once=64), 1),
        "one_at_a_time_per_sec": round(_rate(predictor, folder, at_once=1), 1),
    }


def write_untrained_bundle(folder: Path) -> Path:
    """A signed bundle of a ResNet18 of 224 pixels with random weights; its norms have seen noise, so that no activation overflows."""
    import torch

    from pneumofed.common.config.experiment import ModelConfig
    from pneumofed.common.imaging.augment import GREY_MEAN, GREY_STD
    from pneumofed.common.model_bundle.calibration import Calibration
    from pneumofed.common.model_bundle.manifest import BundleManifest, CardFacts, OperatingPoint, Preprocessing
    from pneumofed.common.model_bundle.sealing import seal_bundle
    from pneumofed.common.models.build import build_model
    from pneumofed.common.wire.keys import NodeKey, parse_private_key
    from pneumofed.server.export.graph import export_onnx, quantize_onnx

    folder.mkdir()
    cfg, noise = ModelConfig(name="resnet18"), np.random.default_rng(0).random((16, 1, 224, 224), np.float32)
    network = build_model(cfg, "binary", seed=0)
    with torch.no_grad():
        network.train()(torch.from_numpy(noise))
    torch.save(network.state_dict(), folder / "weights.pt")
    export_onnx(network, 1, 224, folder / "model.onnx")
    quantize_onnx(folder / "model.onnx", folder / "model_int8.onnx", iter([noise]))
    manifest = BundleManifest(
        name="untrained",
        created=datetime.now(UTC).replace(microsecond=0),
        task="binary",
        classes=("normal", "pneumonia"),
        preprocessing=Preprocessing(size_px=224, fit="pad", in_channels=1, mean=(GREY_MEAN,), std=(GREY_STD,)),
        model=cfg,
        threshold=OperatingPoint(value=0.5, policy="half", target=0.5, raw_value=0.5),
        calibration=Calibration(),
        card=CardFacts(sites=0),
    )
    seal_bundle(folder, manifest, parse_private_key(NodeKey.generate("benchmark").private, "benchmark"))
    return folder


def find_images(folder: Path | None, scratch: Path) -> list[Path]:
    """At most 200 image files of `folder`, or 40 phantoms drawn into `scratch`."""
    if folder is not None:
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm"))[:200]
    from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture

    paths = []
    for patient in draw_patients("train", 40, 0):
        pixels = draw_picture(patient, 1, "train", 0, 512)
        paths.append(scratch / f"{patient.number}.jpeg")
        PIL.Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(paths[-1], quality=92)
    return paths


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--folder-images", type=int, default=1000)
    return parser.parse_args()


def _time_one(predictor: Predictor, path: Path) -> float:
    """Milliseconds from the file, which the system has in memory, to the judgement."""
    started = time.perf_counter()
    predictor.judge([read_image(path)])
    return 1000 * (time.perf_counter() - started)


def _time_graph(predictor: Predictor, repeats: int) -> float:
    side = predictor.manifest.preprocessing.size_px
    image = np.random.default_rng(0).random((1, 1, side, side), np.float32)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        predictor.run(image)
        found.append(1000 * (time.perf_counter() - started))
    return float(np.median(found))


def _rate(predictor: Predictor, paths: list[Path], at_once: int) -> float:
    started = time.perf_counter()
    for first in range(0, len(paths), at_once):
        predictor.judge([read_image(path) for path in paths[first : first + at_once]])
    return len(paths) / (time.perf_counter() - started)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
