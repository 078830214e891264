"""A run that goes on from a bundle's model: what it takes over from it, and whether the two fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import ExperimentConfig
from common.errors import ConfigError
from common.keys import read_public_key
from common.model_bundle.bundle import Bundle, open_bundle


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
