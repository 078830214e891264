"""One bundle and one predictor for all tests of `pneumofed predict`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.predictor import Predictor
from tests.model_bundles import make_bundle


@pytest.fixture(scope="package")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="package")
def predictor(bundle_dir: Path) -> Predictor:
    return Predictor(load_bundle(bundle_dir, None), threads=1)
