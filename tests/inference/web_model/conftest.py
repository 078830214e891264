"""The bundle that these tests make pages of; it was judged on adults and children, in the PA view."""

from __future__ import annotations

import pytest

from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from tests.model_bundles import judged_on, make_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    return load_bundle(make_bundle(folder / "bundle", population=judged_on(age="adult child", view="PA")), None)
