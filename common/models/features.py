"""A network's outputs for a data set: class probabilities, and the features that its classifier sees.

`predict_probabilities` is used by federated evaluation, central evaluation and baselines alike. Where only the classifier is trained, the
features below it are computed once (`load_features`), and `predict_cached` takes the probabilities from them.

In deployment each message starts a new process, so features are kept on the disk, beside the decoded images that they were computed
from: in `cache/features`, one file for each set of images and each body of a network. They reveal as much of a patient as the images
do: only the owner may read the files, they never leave the site, and they go with the decoded images when a patient withdraws. The folder
may be deleted at any time.

A file is named by a hash over everything that features depend on (the pixels, the weights below the classifier, number type, device),
so that it never needs to be known what has changed: other images or weights have another file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.files import atomic_write, exclusive, pass_if_disk_full
from pneumofed.common.imaging.augment import normalize, to_model_input
from pneumofed.common.models.architectures import architecture_of
from pneumofed.common.models.build import classifier_of
from pneumofed.common.models.compute import Compute
from pneumofed.common.models.fusion import image_features

log = logging.getLogger(__name__)

FEATURES_FORMAT = 1
"""Part of every name; to be raised when a network gives other features with the same weights, or the files change their layout."""

MAX_FEATURE_FILES = 8
"""Files of a folder; the oldest beyond go. A run needs two at a site: of training and of validation images."""

_IMAGES_AT_ONCE = 64
_HASHED_AT_ONCE = 1024
_CRC_BYTES = 4

Features = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureSet:
    """A data set whose images have become features, for training only the classifier; row i of each is the same image.

    Attributes:
        features: float32 [N, D], read-only and mapped from disk where it could be written.
        labels: int64 [N].
        patients: of each image.
    """

    features: Features
    labels: NDArray[np.int64]
    patients: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64], compute: Compute) -> Tensor:
        """Copies rows to the device.

        Args:
            rows: int64 [B], positions in [0, N).
            compute: names the device.

        Returns:
            float32 [B, D].
        """
        return torch.from_numpy(np.asarray(self.features)[rows]).to(compute.device)


def has_fixed_body(model: nn.Module, cfg: ModelConfig) -> bool:
    """Decides whether all rounds of a run leave everything below the classifier as it is: frozen, or without parameters.

    Args:
        model: a network of `build_model`.
        cfg: its section; `freeze` counts.
    """
    if cfg.clinical is not None:  # values are taken away anew in each step
        return False
    head = f"{architecture_of(model).head}."
    return cfg.freeze == "head_only" or all(name.startswith(head) for name, _ in model.named_parameters())


def predict_cached(
    model: nn.Module, dataset: Dataset, compute: Compute, experiment: ExperimentConfig, cache_dir: Path
) -> NDArray[np.float64]:
    """Computes class probabilities as `predict_probabilities` does; where the body is fixed, with features from below `cache_dir`.

    Args:
        model: a network of `build_model`; left in evaluation mode.
        dataset: its images and their order; may be empty.
        compute: device and number type.
        experiment: its model section and the batch size of its evaluation.
        cache_dir: the folder of the decoded images; features go into `features` below it.

    Returns:
        float64 [N, C], each row summing to 1.

    Raises:
        DataError: `cache_dir` cannot be written for another reason than a full disk.
    """
    cfg, batch_size = experiment.model, experiment.evaluation.batch_size
    if not has_fixed_body(model, cfg) or not len(dataset):
        return predict_probabilities(model, dataset, compute, cfg.in_channels, batch_size)
    found = FeatureSet(load_features(model, dataset, compute, cfg, cache_dir), dataset.labels, dataset.patients)
    model.eval()
    with torch.inference_mode(), compute.autocast():
        lots = np.split(np.arange(len(found)), range(batch_size, len(found), batch_size))
        logits = torch.cat([classifier_of(model)(found.take(rows, compute)).to("cpu", torch.float64) for rows in lots])
    return torch.softmax(logits, dim=1).numpy()


def load_features(model: nn.Module, dataset: Dataset, compute: Compute, cfg: ModelConfig, cache_dir: Path) -> Features:
    """Loads what `compute_features` gives from the file below `cache_dir` where there is one, else computes it and keeps it there.

    Of several processes that want the same features, one computes and the others wait. A damaged file is computed again; when the
    disk is full the features stay in memory.

    Args:
        model: a network of `build_model`; left in evaluation mode where features are computed.
        dataset: its images and their order.
        compute: device and number type.
        cfg: the section that `model` was built from.
        cache_dir: the folder of the decoded images; features go into `features` below it.

    Returns:
        float32 [N, D], read-only where it is mapped from the file.

    Raises:
        DataError: `cache_dir` cannot be written for another reason than a full disk.
    """
    folder, shape = cache_dir / "features", (len(dataset), classifier_of(model).in_features)
    file = folder / f"{_file_name(model, dataset, compute, cfg)}.features"
    found = _read_features(file, shape)
    if found is not None:
        return found
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(folder):
            found = _read_features(file, shape)
            if found is None:
                _write_features(file, _features_in_chunks(model, dataset, compute, cfg.in_channels), shape)
                _remove_oldest(folder)
                found = _read_features(file, shape)
    except OSError as error:
        pass_if_disk_full(error, folder)
    return compute_features(model, dataset, compute, cfg.in_channels) if found is None else found


def compute_features(model: nn.Module, dataset: Dataset, compute: Compute, in_channels: int) -> Features:
    """Computes the input of the classifier for each image of `dataset`; of a network with clinical values the features of the image.

    The images are not augmented. The classifier of these rows gives what the network gives, to the last bit where the body treats each
    image by itself, else up to what kernels make of another number of rows.

    Args:
        model: a network of `build_model`; left in evaluation mode.
        dataset: its images, at least one, and their order.
        compute: device and number type.
        in_channels: of the network, 1 or 3.

    Returns:
        float32 [N, D].
    """
    return np.concatenate([*_features_in_chunks(model, dataset, compute, in_channels)])


@torch.inference_mode()
def predict_probabilities(
    model: torch.nn.Module, dataset: Dataset, compute: Compute, in_channels: int, batch_size: int
) -> np.ndarray:
    """Computes class probabilities for each image of `dataset`.

    The softmax is taken in float64: scores of a confident network that tie in float32 would otherwise cost AUROC.

    Args:
        model: from normalised images to logits; left in evaluation mode.
        dataset: its images, at least one, and their order.
        compute: device and number type.
        in_channels: of the network, 1 or 3.
        batch_size: images at a time, of volumes slices; changes memory and speed.

    Returns:
        float64 [N, C], each row summing to 1.
    """
    model.eval()
    at_once = images_at_once(batch_size, dataset.pixels)
    lots = [slice(start, start + at_once) for start in range(0, len(dataset.labels), at_once)]
    values = [None if dataset.clinical is None else dataset.clinical[rows] for rows in lots]
    logits = [_logits(model, dataset.pixels[rows], compute, in_channels, one) for rows, one in zip(lots, values, strict=True)]
    return torch.softmax(torch.cat(logits).to("cpu", torch.float64), dim=1).numpy()


def images_at_once(batch_size: int, pixels: np.ndarray) -> int:
    """Counts how many images, or volumes of as many pictures together, go through a network at a time; 1 at least.

    Args:
        batch_size: in pictures.
        pixels: images [N, S, S], or volumes [N, slices, S, S].
    """
    return max(1, batch_size // pixels.shape[1]) if pixels.ndim == 4 else batch_size


def _features_in_chunks(model: nn.Module, dataset: Dataset, compute: Compute, in_channels: int) -> Iterator[Features]:
    seen: list[Features] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].float().cpu().numpy())

    handle = image_features(model, classifier_of(model)).register_forward_pre_hook(keep)
    try:
        at_once = images_at_once(_IMAGES_AT_ONCE, dataset.pixels)
        for start in range(0, len(dataset), at_once):
            rows = np.arange(start, min(start + at_once, len(dataset)))
            predict_probabilities(model, dataset.subset(rows), compute, in_channels, _IMAGES_AT_ONCE)
            yield seen.pop()
    finally:
        handle.remove()


def _file_name(model: nn.Module, dataset: Dataset, compute: Compute, cfg: ModelConfig) -> str:
    network = cfg.model_dump(include={"name", "in_channels", "norm", "weight_standardization", "scattering_scale"})
    where = [compute.device.type, str(compute.dtype), torch.__version__]
    digest = hashlib.sha256(json.dumps([FEATURES_FORMAT, network, where, dataset.pixels.shape]).encode())
    head = f"{architecture_of(model).head}."
    for name, tensor in model.state_dict().items():
        if not name.startswith(head):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for start in range(0, len(dataset), _HASHED_AT_ONCE):
        digest.update(np.ascontiguousarray(dataset.pixels[start : start + _HASHED_AT_ONCE]).data)
    return digest.hexdigest()[:32]


def _write_features(file: Path, chunks: Iterator[Features], shape: tuple[int, int]) -> None:
    """The bare numbers, row by row, and behind them their CRC-32."""
    if shutil.disk_usage(file.parent).free < 4 * shape[0] * shape[1]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checksum = 0
    with atomic_write(file) as stream:
        for chunk in chunks:
            content = chunk.astype("<f4", copy=False).tobytes()
            checksum = zlib.crc32(content, checksum)
            stream.write(content)
        stream.write(checksum.to_bytes(_CRC_BYTES, "little"))


def _read_features(file: Path, shape: tuple[int, int]) -> Features | None:
    """The features in `file`, mapped; None where it is missing or damaged."""
    try:
        if file.stat().st_size == 4 * shape[0] * shape[1] + _CRC_BYTES:
            rows = np.memmap(file, dtype="<f4", mode="r", shape=shape)
            with file.open("rb") as stream:
                stream.seek(-_CRC_BYTES, os.SEEK_END)
                checksum = int.from_bytes(stream.read(), "little")
            if zlib.crc32(rows.data) == checksum:
                return rows
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("kept features cannot be read: %s", error.strerror)
        return None
    log.warning("kept features %s are damaged; they are computed again", file.stem)
    return None


def _remove_oldest(folder: Path) -> None:
    """Only the lock's holder may call it. Hidden files are what killed processes left half-written."""
    written = sorted(folder.glob("[!.]*.features"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in [*written[MAX_FEATURE_FILES:], *folder.glob(".*")]:
        file.unlink(missing_ok=True)


def _logits(
    model: torch.nn.Module, pixels: np.ndarray, compute: Compute, in_channels: int, values: np.ndarray | None = None
) -> torch.Tensor:
    """On the device, to which the bytes go before they become floats; to read them there would wait for each batch."""
    images = normalize(to_model_input(torch.from_numpy(np.array(pixels)).to(compute.device)), in_channels)
    second = () if values is None else (torch.from_numpy(values).to(compute.device),)
    with compute.autocast():
        logits: torch.Tensor = model(compute.move(images), *second)
    return logits
