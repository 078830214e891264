"""A study's own code: named by its hash, one clear sentence for what is wrong with it, and in a hospital only from the app bundle."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.config.reader import experiment_from_json, load_experiment
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import build_model
from pneumofed.common.ops import study_code
from pneumofed.common.ops.app_bundle import build_bundle, hash_bundle, write_app
from pneumofed.common.ops.study_code import describe_name, find_study_code, read_study_code, remember_folder, write_codes
from tests.own_network import BAD, NETWORK, write


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_code, "_known", {})


def test_the_name_is_the_hash_of_the_file_and_the_function(tmp_path: Path) -> None:
    file = write(tmp_path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    experiment = load_experiment(None, {"model": {"name": f"{file}:build_net"}})
    assert experiment.model.name == f"study:{digest}:build_net"
    assert experiment_from_json(experiment.model_dump_json()) == experiment
    assert load_experiment(None, {"model": {"name": f"{file}:Net"}}).model.name == f"study:{digest}:Net"
    write(tmp_path, NETWORK + "\n")
    assert load_experiment(None, {"model": {"name": f"{file}:build_net"}}).model.name != experiment.model.name
    assert describe_name(experiment.model.name) == f"the study's own build_net (SHA-256 {digest[:12]})"


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sentence = BAD[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, source)
    write(tmp_path, "", "beside.py")
    with pytest.raises(ConfigError) as caught:
        experiment = load_experiment(None, {"model": {"name": "net.py:build"}})
        build_model(experiment.model, experiment.task, 0)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [["simulate", "--phantoms", "24", "--model"], ["check-model"]])
@pytest.mark.parametrize("given", ["nowhere.py:build", "net.py:build", "resnet19"])
def test_commands_end_with_exit_code_2_and_the_sentence(
    command: list[str], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, BAD["wrong number of logits"][0])
    found = CliRunner().invoke(app, [*command, given])
    assert isinstance(found.exception, ConfigError)  # `main` makes exit code 2 of it
    assert {"nowhere": "does not exist", "net": "expected logits [2, 2]", "resnet19": "did you mean"}[given.split(".")[0]] in str(
        found.exception
    )
    assert not (tmp_path / "runs").exists()


def test_a_folder_gives_only_what_has_the_hash_that_is_asked_for(tmp_path: Path) -> None:
    code = read_study_code(f"{write(tmp_path)}:build_net")
    other = read_study_code(f"{write(tmp_path / 'other', NETWORK + '#')}:build_net")
    write_codes(tmp_path / "kept", [code, other])  # two files of one name
    study_code._known.clear()
    remember_folder(tmp_path / "kept", [code.name, "resnet18"])
    assert find_study_code(code.name).source == code.source
    with pytest.raises(ConfigError, match=r"SHA-256 [0-9a-f]{12}\) is no part of the code here"):
        find_study_code(other.name)
    study_code._known.clear()
    for path in (tmp_path / "kept").glob("*.py"):
        path.write_text(path.read_text() + "# changed\n")
    remember_folder(tmp_path / "kept", [code.name])
    with pytest.raises(ConfigError):
        find_study_code(code.name)


def test_the_app_bundle_holds_the_file_and_has_another_hash(tmp_path: Path) -> None:
    code = read_study_code(f"{write(tmp_path)}:build_net")
    changed = read_study_code(f"{write(tmp_path / 'other', NETWORK + '#')}:build_net")
    hashes = [hash_bundle(build_bundle(codes)) for codes in ((), [code], [code], [changed])]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3


def test_what_the_file_imports_of_ours_is_in_the_app_too(tmp_path: Path) -> None:
    code = read_study_code(f"{write(tmp_path, 'from pneumofed.common.evaluation import similarity' + NETWORK)}:build_net")
    plain, own = write_app(tmp_path / "plain"), write_app(tmp_path / "own", [code])
    wanted = Path("pneumofed/common/evaluation/similarity.py")
    assert (own / wanted).is_file() and not (plain / wanted).exists()


@pytest.mark.slow
def test_only_the_app_that_holds_the_file_can_build_the_network(tmp_path: Path) -> None:
    """As a hospital's process or a worker of Flower's engine does: it imports the app and knows nothing else."""
    code = read_study_code(f"{write(tmp_path)}:build_net")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pneumofed.common.models.build as build;"
        "from pneumofed.common.config.experiment import ModelConfig;"
        "assert build.__file__.startswith(sys.argv[1]), build.__file__;"
        "print(type(build.build_model(ModelConfig(name=sys.argv[2]), 'binary', 0)).__name__)"
    )
    answers = {}
    for name, codes in (("without", []), ("with", [code])):
        folder = write_app(tmp_path / name, codes)
        answers[name] = subprocess.run(
            [sys.executable, "-P", "-c", program, str(folder), code.name],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    assert answers["with"].stdout == "Net\n", answers["with"].stderr
    assert "is no part of the code here" in answers["without"].stderr.splitlines()[-1]
