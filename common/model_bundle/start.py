"""A run that goes on from a bundle's model: what it takes over from it, and whether the two fit."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import ExperimentConfig, ModelConfig
from common.errors import BundleError, ConfigError, WeightsError
from common.keys import read_public_key
from common.model_bundle.bundle import Bundle, open_bundle
from common.model_bundle.manifest import WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor


def start_values(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Settings of an experiment that starts from `bundle`, which lies at `path`: its weights, its digest, and the parent's own draw of
    validation patients, so that nobody whom the parent was trained on is judged on.
    """
    values: dict[str, Any] = {"parent": bundle.digest, "model": {"weights": str(path.resolve())}}
    origin = bundle.manifest.card.provenance
    if origin is not None and origin.split_seed is not None and origin.validation_fraction is not None:
        values["training"] = {"split_seed": origin.split_seed, "validation_fraction": origin.validation_fraction}
    return values


def check_start(experiment: ExperimentConfig, bundle: Bundle) -> None:
    """Raises ConfigError unless the experiment's network and task are the bundle's, and it names this very bundle."""
    if experiment.parent != bundle.digest:
        raise ConfigError(
            f"{experiment.model.weights} is not the bundle that the run was to start from: its digest is {bundle.digest}, "
            f"expected {experiment.parent}"
        )
    other = [f"model.{sentence}" for sentence in bundle.manifest.model.differences(experiment.model)]
    if bundle.manifest.task != experiment.task:
        other.insert(0, f"task is {bundle.manifest.task!r}, not {experiment.task!r}")
    if other:
        raise ConfigError(f"the bundle does not fit the run, in it {'; '.join(other)}. Set the run to what the bundle has")


def open_start(path: Path, trusted: Sequence[Path]) -> Bundle:
    """The bundle to start from; with `trusted` only if one of these public keys signed it.

    Raises:
        ConfigError: a key cannot be read.
        BundleError: as `open_bundle`.
    """
    return open_bundle(path, [read_public_key(file) for file in trusted] or None)


def read_start_weights(cfg: ModelConfig) -> dict[str, Tensor] | None:
    """The state dict of the bundle that `cfg.weights` names, for `build_model`; None where it names no bundle.

    A folder, .zip or .tar is meant as a bundle: by its name, since PyTorch's own files are zip archives too. Who may have signed it
    is for the caller to say.

    Raises:
        WeightsError: the bundle is damaged, or its model is another network than `cfg`.
    """
    path = Path(cfg.weights)
    if not (path.suffix in (".zip", ".tar") or (cfg.weights not in ("none", "imagenet") and path.is_dir())):
        return None
    import torch

    from common.weights import as_state

    try:
        bundle = open_bundle(path, trusted=None)
        other = bundle.manifest.model.differences(cfg)
        if other:
            raise WeightsError(
                f"the model in the bundle {path} is another network: {'; '.join(other)}; set the run's model to it"
            )
        return as_state(torch.load(io.BytesIO(bundle.read(WEIGHTS)), map_location="cpu", weights_only=True), str(path))
    except (BundleError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"the bundle {path} cannot be started from: {error}") from error
