"""Whether maps of evidence can be believed: parameter randomisation and deletion curves of each method on test images.

    python -m benchmarks.explanations --run runs/kaggle --data DATA --images 200 --out runs/explanations

Each image is explained for the class that the network gives it. The sanity check compares its map with that of networks whose last
layers are random, cascading from the classifier to all of them, by the rank correlation (of values and of absolute values, whichever
mean is larger) and SSIM. Deletion and insertion exchange 16 x 16 cells with a radiograph of the other class, drawn from the training
images that the network is right about; for images called normal also with the image blurred, as Petsiuk et al. do. A gain is the
area under the curve against that of random orders, above 0 where the map does better. "Other images" is the rank correlation of
maps of two images of different patients that are called the same: how much of a map is habit. Intervals: 95 %, bootstrap over patients.

Results are written image by image, and a table at the end; started again with the same --out, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.evaluation.bootstrap import ConfidenceInterval
from pneumofed.common.imaging.images import fit_square, read_image
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.models.build import build_model
from pneumofed.common.seeds import derive_seed, numpy_generator
from pneumofed.inference.explain.attribution import compute_attribution, empty
from pneumofed.inference.explain.cam import LogOdds
from pneumofed.inference.explain.faithfulness import (
    Curves,
    Likeness,
    Sanity,
    by_cell,
    cascade,
    conclude,
    curves,
    likeness,
    mean_interval,
    random_curves,
    show_interval,
    spearman,
)
from pneumofed.inference.explain.focus import LungField, Misplaced, find_lungs, find_markers, judge_focus
from pneumofed.inference.explain.methods import METHODS, Method, Target
from pneumofed.inference.explain.pictures import place_on_image
from pneumofed.server.runs.checkpoints import read_checkpoint

GRADIENTS: tuple[Method, ...] = ("integrated-gradients", "gradient-shap", "occlusion")
SURROGATES: tuple[Method, ...] = ("kernel-shap", "lime")
REFERENCES = 20


@dataclass(frozen=True)
class Subject:
    """One image, ready to be explained."""

    record: ImageRecord
    pixels: np.ndarray
    inputs: Tensor
    target: Target
    references: dict[str, Tensor]
    chance: dict[str, Curves]
    lungs: LungField
    marks: np.ndarray


class Bench:
    """The network, its random relatives, and where images come from."""

    def __init__(self, network: nn.Module, image: ImageConfig, data: Path, seed: int) -> None:
        self.network, self.image, self.seed = network, image, seed
        self.relatives = list(cascade(network, seed))
        test = read_kaggle(data, ("test",))[0].records
        order = numpy_generator("explanations", seed).permutation(len(test))
        self.records = [test[position] for position in order]
        self.others = self._references(read_kaggle(data, ("train",))[0].records)

    def inputs(self, pixels: np.ndarray) -> Tensor:
        square = fit_square(pixels, self.image.size_px, self.image.fit)
        return torch.from_numpy((np.rint(square * 255.0) / 255.0).astype(np.float32))[None, None]

    def subject(self, number: int) -> Subject:
        record = self.records[number]
        pixels = read_image(record.path).pixels
        inputs = self.inputs(pixels)
        target: Target = "pneumonia" if self._score(inputs) > 0 else 0
        pool = self.others[target == 0]
        references = {"other": pool[number % len(pool)]} | ({"blurred": empty(inputs)} if target == 0 else {})
        score = LogOdds(self.network, target)
        chance = {name: random_curves(score, inputs, one, derive_seed(self.seed, number)) for name, one in references.items()}
        return Subject(record, pixels, inputs, target, references, chance, find_lungs(pixels), find_markers(pixels))

    def measure(self, subject: Subject, method: Method, stages: int) -> dict[str, Any]:
        """Everything of one map; its likeness with the maps of the last `stages` of the cascade."""
        started, score = time.process_time(), LogOdds(self.network, subject.target)
        own = compute_attribution(self.network, subject.inputs, method, subject.target, seed=self.seed)
        seconds = time.process_time() - started
        alike = {
            share: asdict(
                likeness(own.values, compute_attribution(other, subject.inputs, method, subject.target, seed=self.seed).values)
            )
            for share, other in self.relatives[-stages:]
        }
        gains = {
            name: _gains(curves(score, subject.inputs, own.values, one), subject.chance[name])
            for name, one in subject.references.items()
        }
        shape = (subject.pixels.shape[0], subject.pixels.shape[1])
        side, cells_across = max(shape) if self.image.fit == "pad" else min(shape), self.image.size_px / own.cell_px
        placed = place_on_image(own.values, shape, self.image.fit)
        focus = judge_focus(placed, subject.lungs, subject.marks, side / cells_across / 2, cells=cells_across)
        cells = [round(float(value), 6) for value in by_cell(own.values) / max(1e-30, float(np.abs(own.values).max()))]
        return {"seconds": seconds, "likeness": alike, "gains": gains, "focus": asdict(focus), "cells": cells}

    def _references(self, records: tuple[ImageRecord, ...]) -> dict[bool, list[Tensor]]:
        """Training images that the network is right about, by whether they are pneumonia."""
        found: dict[bool, list[Tensor]] = {False: [], True: []}
        for position in numpy_generator("references", self.seed).permutation(len(records)):
            ill = records[position].label != "normal"
            if len(found[ill]) < REFERENCES:
                inputs = self.inputs(read_image(records[position].path).pixels)
                if (self._score(inputs) > 0) == ill:
                    found[ill].append(inputs)
            if all(len(some) == REFERENCES for some in found.values()):
                break
        return found

    @torch.inference_mode()
    def _score(self, inputs: Tensor) -> float:
        return float(LogOdds(self.network, "pneumonia")(inputs))


def _gains(found: Curves, chance: Curves) -> dict[str, float]:
    return {
        "deletion": chance.deletion_area - found.deletion_area,
        "insertion": found.insertion_area - chance.insertion_area,
        "deletion_area": found.deletion_area,
        "insertion_area": found.insertion_area,
        "random_deletion_area": chance.deletion_area,
        "random_insertion_area": chance.insertion_area,
    }


def run(bench: Bench, counts: dict[Method, int], cascaded: int, out: Path) -> list[dict[str, Any]]:
    """One row for each image and method, also written to `out/maps.jsonl`; rows that are there are not measured again."""
    file = out / "maps.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(row["image"], row["method"]) for row in rows}
    with file.open("a") as lines:
        for number in range(max(counts.values())):
            wanted = [method for method, count in counts.items() if number < count and (number, method) not in done]
            if not wanted:
                continue
            subject, stages = bench.subject(number), len(bench.relatives) if number < cascaded else 1
            for method in wanted:
                row = {"image": number, "method": method, **_facts(subject), **bench.measure(subject, method, stages)}
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                rows.append(json.loads(json.dumps(row)))
    return rows


def _facts(subject: Subject) -> dict[str, Any]:
    called = "pneumonia" if subject.target == "pneumonia" else "normal"
    return {"patient": subject.record.patient, "label": subject.record.label, "called": called}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    return "\n\n".join("\n".join(part) for part in (list(_sanity_rows(rows)), list(_curve_rows(rows)), list(_focus_rows(rows))))


def _by_method(rows: list[dict[str, Any]]) -> Iterator[tuple[Method, list[dict[str, Any]]]]:
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            yield method, mine


def _sanity_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    shares = sorted({share for row in rows for share in row["likeness"]}, key=float)
    yield f"| method | images | s/map | {' | '.join(f'{float(share):.0%} random' for share in shares)} | SSIM, all random | verdict |"
    yield "|---" * (5 + len(shares)) + "|"
    for method, mine in _by_method(rows):
        found = [_sanity(method, mine, share) for share in shares]
        ranks = " | ".join(show_interval(max(one.rank, one.absolute_rank, key=lambda mean: mean["value"])) for one in found)
        seconds = float(np.median([row["seconds"] for row in mine]))
        yield f"| {method} | {len(mine)} | {seconds:.2f} | {ranks} | {show_interval(found[-1].structure)} | {found[-1].verdict} |"


def _sanity(method: Method, rows: list[dict[str, Any]], share: str) -> Sanity:
    part = [row for row in rows if share in row["likeness"]]
    return conclude(method, [Likeness(**row["likeness"][share]) for row in part], [row["patient"] for row in part])


def _curve_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| method | called, exchanged with | images | deletion area (random) | gain | insertion area (random) | gain |"
    yield "|---" * 7 + "|"
    for method, mine in _by_method(rows):
        for called, reference in (("pneumonia", "other"), ("normal", "other"), ("normal", "blurred")):
            part = [row for row in mine if row["called"] == called]
            if part:
                what = "an image of the other class" if reference == "other" else "itself, blurred"
                cells = " | ".join(_curve_cells(part, reference, kind) for kind in ("deletion", "insertion"))
                yield f"| {method} | {called}, {what} | {len(part)} | {cells} |"


def _curve_cells(rows: list[dict[str, Any]], reference: str, kind: str) -> str:
    own, chance, gain = (_mean_of(rows, reference, key) for key in (f"{kind}_area", f"random_{kind}_area", kind))
    return f"{own['value']:.3f} ({chance['value']:.3f}) | {show_interval(gain, 3)}"


def _mean_of(rows: list[dict[str, Any]], reference: str, key: str) -> ConfidenceInterval:
    return mean_interval([row["gains"][reference][key] for row in rows], [row["patient"] for row in rows])


def _focus_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| method | images called pneumonia | weight outside the lungs | area outside | flagged outside | flagged marks | other images |"
    yield "|---" * 7 + "|"
    for method, mine in _by_method(rows):
        part = [row["focus"] | {"patient": row["patient"]} for row in mine if row["called"] == "pneumonia"]
        columns: list[list[float]] = [[one["outside"] for one in part], [one["outside_area"] for one in part]]
        columns += [[float(flag in one["warnings"]) for one in part] for flag in (Misplaced.OUTSIDE, Misplaced.MARKS)]
        columns.append(_habit([row for row in mine if row["called"] == "pneumonia"]))
        cells = [show_interval(mean_interval(column, [one["patient"] for one in part])) for column in columns]
        yield f"| {method} | {len(part)} | {' | '.join(cells)} |"


def _habit(rows: list[dict[str, Any]]) -> list[float]:
    """Rank correlation of each image's map, by cells, with that of the next of another patient; NaN where there is none."""
    found = []
    for number, row in enumerate(rows):
        others = [other for other in rows[number + 1 :] + rows[:number] if other["patient"] != row["patient"]]
        found.append(spearman(np.array(row["cells"]), np.array(others[0]["cells"])) if others else float("nan"))
    return found


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, ImageConfig]:
    if arguments.bundle:
        bundle = load_bundle(arguments.bundle, None)
        return bundle.load_network(), bundle.manifest.preprocessing.image
    checkpoint = read_checkpoint(arguments.run / "checkpoints" / "best.pt")
    network = build_model(checkpoint.experiment.model.without_weights(), checkpoint.experiment.task, seed=0)
    network.load_state_dict(torch.load(arguments.run / "checkpoints" / "best.pt", weights_only=True)["model"])
    return network.eval(), checkpoint.experiment.image


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(*_load(arguments), arguments.data, arguments.seed)
    slow = dict.fromkeys(GRADIENTS, arguments.gradient_images) | dict.fromkeys(SURROGATES, arguments.surrogate_images)
    counts = {method: min(arguments.images, slow.get(method, arguments.images)) for method in METHODS}
    text = table(run(bench, counts, arguments.cascaded, arguments.out))
    (arguments.out / "explanations.md").write_text(text + "\n")
    print(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder; its best checkpoint is taken")
    source.add_argument("--bundle", type=Path, help="model bundle")
    parser.add_argument("--data", type=Path, required=True, help="folder in the Kaggle layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200, help="test images for Grad-CAM and Grad-CAM++")
    parser.add_argument("--gradient-images", type=int, default=40, help="the first of them, for gradients and occlusion")
    parser.add_argument("--surrogate-images", type=int, default=20, help="the first of them, for LIME and SHAP on superpixels")
    parser.add_argument("--cascaded", type=int, default=20, help="the first of them, for the whole cascade")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
