"""One import name: what `pip install` leaves behind, beside other people's packages with plain names, and in a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("client", "common", "inference", "server", "simulation")
ALL_COMMANDS = """
import sys
from typer.main import get_command
from typer.testing import CliRunner
from click import Group
from pneumofed.cli.main import app

def paths(command, path=()):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from paths(child, (*path, name))

found = list(paths(get_command(app)))
for path in found:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, (path, result.output)
strangers = {name for name in sys.modules if name.partition(".")[0] in ("client", "common", "inference", "server", "simulation")}
assert not strangers, strangers
print(len(found))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """The repository as a clone has it: links stay links, and what is built or hidden stays behind."""
    hidden = {
        path.name for path in ROOT.iterdir() if path.name.startswith(".") or path.name in ("build", "runs", "dist", "tests")
    }
    shutil.copytree(
        ROOT, target, symlinks=True,
        ignore=lambda folder, names: {name for name in names if name == "__pycache__" or (Path(folder) == ROOT and name in hidden)},
    )  # fmt: skip
    return target


def pip(python: Path, *words: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *words, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "source")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
        cwd=folder,
    )
    (built,) = folder.glob("pneumofed-*.whl")
    return built


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment of its own with this one's dependencies, but not with this checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    dependencies = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    dependencies |= {path for path in sys.path if path.endswith("site-packages")}
    (packages / "dependencies.pth").write_text(
        "\n".join(sorted(dependencies))
    )  # whose own .pth files, so our checkout, do not count
    return python


def foreign_wheel(folder: Path) -> Path:
    """Somebody else's distribution with our folders' names at the top; their `common.config` cannot even be imported."""
    path = folder / "stranger-1.0-py3-none-any.whl"
    files = {f"{house}/__init__.py": "" for house in HOUSES} | {"common/config.py": "raise RuntimeError('the stranger')\n"}
    files |= {
        "stranger-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
        "stranger-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, "stranger-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {"stranger-1.0.dist-info/RECORD": record}).items():
            archive.writestr(name, text)
    return path


def site_packages(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python3*")) / "site-packages"


def test_the_wheel_holds_one_name_at_the_top_and_all_that_the_pages_need(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pneumofed"}
    inside = {name.removeprefix("pneumofed/") for name in names}
    needed = {str(path.relative_to(ROOT)) for house in HOUSES for path in (ROOT / house).rglob("*") if path.is_file()}
    needed = {name for name in needed if "__pycache__" not in name}
    assert needed <= inside, sorted(needed - inside)


@pytest.mark.slow
def test_every_command_works_beside_a_stranger_and_either_can_go(wheel: Path, python: Path, tmp_path: Path) -> None:
    stranger = foreign_wheel(tmp_path)
    pip(python, "install", "--quiet", "--no-index", "--no-deps", wheel, stranger, cwd=tmp_path)
    assert int(run(python, "-c", ALL_COMMANDS, cwd=tmp_path)) > 40
    command = python.parent / "pneumofed"
    run(command, "phantom", tmp_path / "phantoms", "--patients", "8", cwd=tmp_path)
    packages = site_packages(python)
    ours = sorted(path.relative_to(packages) for path in (packages / "pneumofed").rglob("*.py"))
    theirs = sorted(path for house in HOUSES for path in (packages / house).rglob("*.py"))
    pip(python, "uninstall", "--quiet", "--yes", "stranger", cwd=tmp_path)
    assert sorted(path.relative_to(packages) for path in (packages / "pneumofed").rglob("*.py")) == ours
    run(command, "--version", cwd=tmp_path)
    pip(python, "install", "--quiet", "--no-index", "--no-deps", stranger, cwd=tmp_path)
    pip(python, "uninstall", "--quiet", "--yes", "pneumofed", cwd=tmp_path)
    assert not (packages / "pneumofed").exists()
    assert all(path.is_file() for path in theirs)


@pytest.mark.slow
def test_folders_of_our_names_where_one_stands_do_not_matter(tmp_path: Path) -> None:
    for house in HOUSES:
        (tmp_path / house).mkdir()
        (tmp_path / house / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    assert int(run(sys.executable, "-c", ALL_COMMANDS, cwd=tmp_path)) > 40


def test_a_checkout_without_links_is_refused_in_a_sentence(tmp_path: Path) -> None:
    package = tmp_path / "pneumofed"
    package.mkdir()
    shutil.copy(ROOT / "pneumofed" / "__init__.py", package)
    for house in HOUSES:
        (package / house).write_text(f"../{house}")  # what git writes where links cannot be made
    done = subprocess.run(
        [sys.executable, "-c", "import pneumofed"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode
    assert "is a link to" in done.stderr and "core.symlinks" in done.stderr


BUNDLE_IMPORTS = """
import sys
import pneumofed.client.app, pneumofed.server.app
print(pneumofed.client.app.__file__, pneumofed.server.app.__file__)
assert not [name for name in sys.modules if name.partition(".")[0] in ("client", "common", "server")]
"""


@pytest.mark.parametrize("source", [pytest.param("the checkout", marks=pytest.mark.slow), "what a run sends"])
def test_an_unpacked_bundle_imports_its_own_code_under_one_name(source: str, tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    from pneumofed.common.ops.app_bundle import build_bundle

    from_checkout = source == "the checkout"
    content = build_fab_from_disk(copy_checkout(tmp_path / "checkout")) if from_checkout else build_bundle()
    (tmp_path / "app.fab").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "app.fab") as archive:
        archive.extractall(tmp_path / "unpacked")
    told = run(sys.executable, "-c", BUNDLE_IMPORTS, cwd=tmp_path, PYTHONPATH=str(tmp_path / "unpacked"))
    assert all(path.startswith(str(tmp_path / "unpacked")) for path in told.split())


def test_the_command_line_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy: Sequence[str] = ("torch", "flwr", "ray", "matplotlib", "sklearn", "scipy", "onnxruntime", "sqlalchemy", "fastapi")
    told = run(
        sys.executable, "-c", f"import sys, pneumofed.cli.main; print(*sorted(set({heavy!r}) & set(sys.modules)))", cwd=tmp_path
    )
    assert not told.split()
