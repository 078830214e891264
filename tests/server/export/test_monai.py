"""MONAI reads the bundle's metadata and runs the network by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.server.export.graph import write_monai
from tests.model_bundles import make_bundle, signing_key


@pytest.mark.slow
def test_monai_finds_inputs_and_outputs_as_the_metadata_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.bundle import verify_net_in_out

    folder = make_bundle(tmp_path / "bundle")
    manifest = load_bundle(folder, None).manifest
    write_monai(folder, manifest)
    seal_bundle(folder, manifest, signing_key())
    monkeypatch.chdir(folder)
    verify_net_in_out(
        net_id="network_def", meta_file="metadata.json", config_file="configs/inference.json", device="cpu", bundle_root="."
    )


def test_metadata_names_classes_and_shapes(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    write_monai(folder, load_bundle(folder, None).manifest)
    told = json.loads((folder / "metadata.json").read_text())
    assert told["network_data_format"]["inputs"]["image"]["spatial_shape"] == [32, 32]
    assert told["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "normal", "1": "pneumonia"}
