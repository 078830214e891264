"""Which class activation map finds the opacity best: last layer, a finer layer, a larger input, or several sizes together.

    OMP_NUM_THREADS=1 python -m benchmarks.map_localisation

A network is trained on phantoms at 128 px, whose opacities are known, and Grad-CAM of the test phantoms with pneumonia that it calls so
is compared with where the opacity lies: pixels with at least half of the opacity's greatest strength.

- Pointing game (Zhang et al. 2018, section 4.1): does the largest value lie on the opacity, or within a sixteenth of the side of it?
- Intersection over union: of the opacity and the map's strongest pixels, as many as the opacity has.

"Chance" is what a random point, or as many random pixels, would have. Differences are to the last layer at 128 px, of the same images.
Intervals: 95 %, bootstrap over patients. One thread, some minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.imaging.images import fit_square
from pneumofed.common.models.build import build_model
from pneumofed.common.seeds import numpy_generator, torch_generator
from pneumofed.inference.explain.attribution import compute_attribution
from pneumofed.inference.explain.cam import LogOdds, at_size, enlarge, finer_layer, grad_cam, larger_side
from pneumofed.inference.explain.faithfulness import mean_interval, show_interval
from pneumofed.inference.explain.methods import Detail
from pneumofed.simulation.phantoms.image import draw_opacity
from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture

SIZE_PX = 128
LARGER_PX = larger_side(SIZE_PX)
BATCH_IMAGES = 16
TOLERANCE = 1 / 16


def draw(split: str, patients: int, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Draws one picture of each patient: squares float32 [N, 1, L, L] at `LARGER_PX`, labels [N], opacities bool [N, S, S]."""
    squares, labels, opacities = [], [], []
    for patient in draw_patients(split, patients, seed):
        squares.append(fit_square(draw_picture(patient, 1, split, seed, LARGER_PX), LARGER_PX, "pad"))
        rng = numpy_generator("phantom", seed, split, patient.number, 1)  # as `draw_picture`
        opacity = fit_square(draw_opacity(patient.anatomy, patient.label, LARGER_PX, rng), SIZE_PX, "pad")
        labels.append(int(patient.label != "normal"))
        opacities.append(opacity >= max(float(opacity.max()), 1e-6) / 2)
    return torch.from_numpy(np.stack(squares))[:, None], torch.tensor(labels), np.stack(opacities)


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Trains ResNet18 from random weights on squares of `SIZE_PX`, mirrored and shifted at random."""
    network = build_model(ModelConfig(name="resnet18"), "binary", seed)
    generator = torch_generator("map localisation", seed)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // BATCH_IMAGES)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // BATCH_IMAGES * BATCH_IMAGES].split(BATCH_IMAGES):
            shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
            batch = torch.roll(images[rows], shift, dims=(2, 3))
            loss = functional.cross_entropy(network(normalize(batch, 1)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def variants(network: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The maps that are compared, by name; each takes a picture float32 [1, 1, L, L] at `LARGER_PX`."""

    def shown(detail: Detail) -> Callable[[Tensor], Tensor]:
        def make(larger: Tensor) -> Tensor:
            found = compute_attribution(network, at_size(larger, SIZE_PX), "grad-cam", detail=detail, larger=larger)
            return torch.from_numpy(found.values)

        return make

    def both(larger: Tensor) -> Tensor:
        return enlarge(grad_cam(LogOdds(network, "pneumonia"), larger, finer_layer(network)), SIZE_PX)

    return {
        f"last layer, {SIZE_PX} px (4 x 4)": shown("last-layer"),
        f"finer layer, {SIZE_PX} px (8 x 8)": shown("finer-layer"),
        f"last layer, {LARGER_PX} px (7 x 7)": shown("larger-input"),
        f"finer layer, {LARGER_PX} px (14 x 14)": both,
        "last layer, mean of four sizes": shown("several-sizes"),
    }


def near(opacity: np.ndarray) -> np.ndarray:
    """The opacity and what is within the tolerance of it."""
    grown: np.ndarray = distance_transform_edt(~opacity) <= TOLERANCE * SIZE_PX
    return grown


def points_at(values: np.ndarray, opacity: np.ndarray) -> float:
    """1 where the largest value lies on the opacity or near it, else 0; an empty map points nowhere."""
    return float(values.max() > 0 and near(opacity).ravel()[int(values.argmax())])


def overlap(values: np.ndarray, opacity: np.ndarray) -> float:
    """Intersection over union of the opacity and as many of the strongest pixels; pixels of an empty map count for nothing."""
    strongest = np.zeros(values.size, bool)
    strongest[np.argsort(-values.ravel(), kind="stable")[: int(opacity.sum())]] = True
    strongest &= values.ravel() > 0
    return float((strongest & opacity.ravel()).sum() / (strongest | opacity.ravel()).sum())


def measure(network: nn.Module, images: Tensor, opacities: np.ndarray) -> Iterator[str]:
    """The table's lines."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in variants(network)}
    for image, opacity in zip(images, opacities, strict=True):
        for name, make in variants(network).items():
            values = make(image[None]).numpy()
            found[name][0].append(points_at(values, opacity))
            found[name][1].append(overlap(values, opacity))
    first = next(iter(found.values()))
    yield "| map | pointing game | difference | intersection over union | difference |"
    yield "|---|---|---|---|---|"
    for name, both in found.items():
        cells = []
        for own, base in zip(both, first, strict=True):
            differences = mean_interval(np.subtract(own, base).tolist())
            cells += [show_interval(mean_interval(own)), "" if own is base else show_interval(differences)]
        yield f"| {name} | {' | '.join(cells)} |"
    areas = opacities.mean(axis=(1, 2))
    chance = mean_interval([float(near(one).mean()) for one in opacities]), mean_interval((areas / (2 - areas)).tolist())
    yield f"| chance | {show_interval(chance[0])} | | {show_interval(chance[1])} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=400, help="phantoms to train on")
    parser.add_argument("--test", type=int, default=120, help="phantoms to test on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    images, labels, _ = draw("train", arguments.patients, arguments.seed)
    network = train(at_size(images, SIZE_PX), labels, arguments.epochs, arguments.seed)
    images, labels, opacities = draw("test", arguments.test, arguments.seed)
    with torch.inference_mode():
        called = LogOdds(network, "pneumonia")(at_size(images, SIZE_PX)) > 0
    right = float((called == (labels == 1)).float().mean())
    kept = called & (labels == 1)
    print(f"accuracy {right:.3f} on {len(labels)} test phantoms; {int(kept.sum())} with pneumonia called so are explained")
    print("\n".join(measure(network, images[kept], opacities[kept.numpy()])))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
