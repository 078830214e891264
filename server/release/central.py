"""The two models on the coordinator's held-out sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.compute import build_compute
from common.data.dataset import load_dataset
from common.data.manifest import read_manifest
from common.evaluation.comparison import Comparison
from common.model_bundle.bundle import Bundle
from common.model_bundle.paired import compare_bundles


def compare_on_sets(
    old: Bundle, new: Bundle, manifests: Mapping[str, Path], cache: Path, device: str = "auto", threads: int = 0
) -> dict[str, Comparison]:
    """The comparison on each of `manifests` (`test`, `external`); images are decoded through `cache`.

    Raises:
        DataError, ConfigError: a set cannot be used.
    """
    compute = build_compute(device, "fp32", threads)
    found = {}
    for name, path in manifests.items():
        manifest = read_manifest(path)
        datasets = tuple(
            load_dataset(manifest, bundle.manifest.task, bundle.manifest.preprocessing.image, cache / name, keep_duplicates=True)
            for bundle in (old, new)
        )
        found[name] = compare_bundles(old, new, (datasets[0], datasets[1]), compute)
    return found
