"""The work that every system does, from the files of `benchmarks.peers.prepare`: what a study's own training script would hold.

NVFlare's client script, the plain Flower app and the bare loop call the functions of this file; pneumofed does the same work by its own
code, from the same images, splits, batches and first weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.imaging.augment import normalize, to_model_input
from pneumofed.common.models.build import build_model
from pneumofed.common.seeds import derive_seed

EVALUATION_BATCH = 64
WORK_FILE, IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = (
    "work.json",
    "images.npy",
    "labels.npy",
    "test_images.npy",
    "test_labels.npy",
)
BYTES_FILE, RESULT_FILE, FINAL_FILE = "bytes.txt", "result.json", "final.pt"
"""What a system leaves in its turn's folder: a line `DOWN UP` for each message answered, the test AUROC, and the final weights."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Hospital:
    """One hospital's share.

    Attributes:
        name: of the site.
        train, validation: positions of its images in the image file.
        batches: the positions of each batch's images, by round; every training image once a round.
    """

    name: str
    train: list[int]
    validation: list[int]
    batches: list[list[list[int]]]


@dataclass(frozen=True)
class Recipe:
    """What is trained: the same for every system.

    Attributes:
        model: a network of pneumofed's list.
        size_px: side of the images.
        rounds, batch_size, learning_rate, momentum: of FedAvg over SGD, one pass over a hospital's images a round.
        seed: of the split, the batches and the first weights.
        parallel: hospitals at once, one thread each.
    """

    model: ModelName
    size_px: int
    rounds: int
    batch_size: int
    learning_rate: float
    momentum: float
    seed: int
    parallel: int


@dataclass(frozen=True)
class Work:
    """The folder with everything."""

    folder: Path
    recipe: Recipe
    hospitals: tuple[Hospital, ...]

    @classmethod
    def read(cls, folder: str | Path) -> Work:
        values = json.loads((Path(folder) / WORK_FILE).read_text())
        return cls(Path(folder), Recipe(**values["recipe"]), tuple(Hospital(**one) for one in values["hospitals"]))

    def write(self) -> None:
        values = {"recipe": asdict(self.recipe), "hospitals": [asdict(one) for one in self.hospitals]}
        (self.folder / WORK_FILE).write_text(json.dumps(values))

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """uint8 [N, S, S], mapped."""
        return np.load(self.folder / IMAGES, mmap_mode="r")

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        return np.load(self.folder / LABELS)

    @property
    def steps_a_round(self) -> int:
        """Optimizer steps of all hospitals in one round."""
        return sum(len(hospital.batches[0]) for hospital in self.hospitals)

    def number_of(self, name: str) -> int:
        return [hospital.name for hospital in self.hospitals].index(name)


def first_network(recipe: Recipe) -> nn.Module:
    """Builds the network with the first weights, pneumofed's own of this seed, in channels-last memory; torch gets one thread."""
    torch.set_num_threads(1)
    network = build_model(ModelConfig(name=recipe.model), "binary", derive_seed(recipe.seed, "initial weights"))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def state_of(network: nn.Module) -> State:
    """Copies the weights and running statistics; counters of BatchNorm, which are no quantity to average, stay behind."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    network.load_state_dict(dict(state), strict=False)


def train(work: Work, network: nn.Module, number: int, round_number: int) -> int:
    """Trains in place on one hospital's batches of a round.

    Args:
        work: images and recipe.
        network: with the global weights.
        number: of the hospital, from 0.
        round_number: from 1.

    Returns:
        The hospital's number of training images.
    """
    recipe, hospital = work.recipe, work.hospitals[number]
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    for rows in hospital.batches[round_number - 1]:
        optimizer.zero_grad(set_to_none=True)
        logits = network(_inputs(work.images[rows]))
        nn.functional.cross_entropy(logits, torch.from_numpy(work.labels[rows])).backward()
        optimizer.step()
    return len(hospital.train)


def evaluate(work: Work, network: nn.Module, number: int) -> tuple[float, float, int]:
    """Computes mean loss and accuracy on one hospital's validation images, and counts these; zeros where it has none.

    Args:
        work: the images.
        network: with the global weights.
        number: of the hospital, from 0.
    """
    rows = work.hospitals[number].validation
    if not rows:
        return 0.0, 0.0, 0
    logits, labels = _logits(network, work.images[rows]), torch.from_numpy(work.labels[rows])
    loss = float(nn.functional.cross_entropy(logits, labels))
    return loss, float((logits.argmax(dim=1) == labels).float().mean()), len(rows)


def finish(work: Work, network: nn.Module, turn: Path) -> None:
    """Judges the final model on the test set and leaves its AUROC and weights in the turn's folder.

    Args:
        work: the test set.
        network: with the final weights.
        turn: folder of the turn.
    """
    logits = _logits(network, np.load(work.folder / TEST_IMAGES, mmap_mode="r"))
    scores = (logits[:, 1] - logits[:, 0]).numpy()
    area = auroc(np.load(work.folder / TEST_LABELS), scores)
    torch.save(state_of(network), turn / FINAL_FILE)
    (turn / RESULT_FILE).write_text(json.dumps({"auroc": area}))


def auroc(labels: NDArray[np.int64], scores: NDArray[np.floating]) -> float:
    """Computes the area under the ROC curve by the Mann-Whitney statistic, ties as one half.

    Args:
        labels: 0 or 1, both there.
        scores: larger for class 1.
    """
    ranks, positive = rankdata(scores), labels == 1
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(labels) - count)))


def mean_state(states: Iterable[tuple[Mapping[str, Tensor], int]]) -> State:
    """Computes FedAvg's mean by numbers of images (McMahan et al. 2017, algorithm 1), one state in memory at a time.

    Args:
        states: weights and the number of images behind them; at least one.
    """
    total, sums = 0, dict[str, Tensor]()
    for state, images in states:
        total += images
        for name, tensor in state.items():
            part = tensor.double() * images
            sums[name] = sums[name].add_(part) if name in sums else part
    return {name: (tensor / total).float() for name, tensor in sums.items()}


def note_bytes(turn: Path, down: int, up: int) -> None:
    """Adds a line to the turn's list of messages.

    Args:
        turn: folder of the turn.
        down, up: bytes of arrays in the message to the hospital and in its reply.
    """
    with (turn / BYTES_FILE).open("a") as file:
        file.write(f"{down} {up}\n")


def _inputs(pixels: NDArray[np.uint8]) -> Tensor:
    return normalize(to_model_input(pixels), in_channels=1).to(memory_format=torch.channels_last)


@torch.inference_mode()
def _logits(network: nn.Module, pixels: NDArray[np.uint8]) -> Tensor:
    network.eval()
    starts = range(0, len(pixels), EVALUATION_BATCH)
    return torch.cat([network(_inputs(pixels[start : start + EVALUATION_BATCH])) for start in starts])
