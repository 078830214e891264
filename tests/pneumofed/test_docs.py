"""The Python examples of the documentation run as they stand there."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import PIL.Image
import pytest
from nbclient import NotebookClient
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.model_bundle.bundle import pack
from pneumofed.common.wire.keys import format_public_key
from pneumofed.simulation.phantoms.phantom import write_phantoms
from tests.dicom_factory import write_dicom
from tests.model_bundles import make_bundle, phantom_images, signing_key

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_federation.ipynb"
PAGE = ROOT / "docs" / "python.md"
BUNDLE_PAGE = ROOT / "docs" / "model-bundle.md"
OWN_NETWORK_PAGE = ROOT / "docs" / "own-network.md"


def examples(page: Path) -> list[str]:
    """The Python blocks of `page`, each at its own line, so that a traceback names the line."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


def write_bundle_and_images() -> None:
    """Writes what the examples read into the current folder: `bundle.zip`, `image.png` and `image.dcm`."""
    pack(make_bundle(Path("bundle").absolute()), Path("bundle.zip"))
    grey = np.rint(phantom_images(3)[2][0].pixels * 255).astype(np.uint8)
    PIL.Image.fromarray(grey).save("image.png")
    write_dicom(Path("image.dcm"), grey.astype(np.uint16) * 16)


def test_the_examples_of_the_page_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle_and_images()
    write_phantoms(Path("chest_xray"), patients=24, seed=0, size_px=64)
    blocks, names = examples(PAGE), dict[str, object]()
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert Path("why.png").is_file() and Path("first-bundle.zip").is_file()


def test_the_example_of_the_bundle_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle_and_images()
    Path("node.pub").write_bytes(format_public_key(signing_key().public_key(), "coordinator"))
    (block,) = examples(BUNDLE_PAGE)
    exec(compile(block, str(BUNDLE_PAGE), "exec"), {})
    assert capsys.readouterr().out.startswith(("normal ", "pneumonia "))


@pytest.mark.slow
def test_the_network_of_the_page_is_checked_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle_and_images()
    network, run = examples(OWN_NETWORK_PAGE)
    assert len([line for line in network.splitlines() if line.strip()]) <= 20
    Path("my_net.py").write_text(network.lstrip("\n"))
    checked = CliRunner().invoke(app, ["check-model", "my_net.py:build_net", "--image-size", "64", "--json"])
    assert {row["answer"] for row in json.loads(checked.output)} == {"yes"}
    exec(compile(run, str(OWN_NETWORK_PAGE), "exec"), {})
    status, name = capsys.readouterr().out.splitlines()[-1].rsplit(" ", 1)
    assert status in ("judged", "cannot judge") and name == f"study:{hash_of('my_net.py')}:build_net"


def hash_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_example_of_the_readme_is_python() -> None:
    for block in examples(ROOT / "README.md"):
        compile(block, "README.md", "exec")
    assert examples(ROOT / "README.md")


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert "round   3/3" in text and "cannot judge None a picture in colour" in text
    assert {"text/html", "image/png"} <= shown
    assert not [output for output in outputs if output.get("name") == "stderr"]  # no warning of a library


def test_the_notebook_is_stored_without_what_a_machine_leaves() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count") and not cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
