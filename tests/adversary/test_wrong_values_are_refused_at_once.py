"""Promise: what cannot work is refused at once in one sentence. Attack: values that hung, crashed or meant nothing later on."""

from __future__ import annotations

import socket
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config, load_experiment, set_by_path
from pneumofed.common.errors import ConfigError
from pneumofed.simulation import superlink
from pneumofed.simulation.superlink import Resources

REFUSED = {
    "batch_size": ["--set", "training.batch_size=1"],
    "noise_multiplier": ["--set", "privacy.mechanism=dp_sgd", "--set", "privacy.noise_multiplier=1e-200"],
    "learning_rate": ["--set", "training.learning_rate=.inf"],
    "--gpus": ["--gpus", "1"],
    "--ray-address": ["--ray-address", "127.0.0.1:1"],
}


def float_keys(schema: type[BaseModel], path: str = "") -> list[str]:
    """Every key, however deep, that takes a float."""
    found = []
    for name, field in schema.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        kinds += [part for kind in kinds for part in typing.get_args(kind)]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += float_keys(field.annotation, f"{path}{name}.")
        elif float in kinds:
            found.append(f"{path}{name}")
    return found


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("schema", [ExperimentConfig, SitePolicy])
def test_no_number_of_a_configuration_is_infinite_or_nan(schema: Any, value: float) -> None:
    keys = float_keys(schema)
    assert len(keys) >= (30 if schema is ExperimentConfig else 2)
    for key in keys:
        values: dict[str, Any] = {}
        set_by_path(values, key, value)
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            build_config(schema, values)


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_neither_does_a_file_bring_one_in(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{learning_rate: {text}}}\n")
    with pytest.raises(ConfigError, match="finite"):
        load_experiment(path)


def test_a_batch_of_one_is_refused_under_batchnorm_only() -> None:
    with pytest.raises(ConfigError, match="BatchNorm"):
        build_config(ExperimentConfig, {"training": {"batch_size": 1}})
    for model in ({"norm": "group"}, {"name": "scattering"}, {"freeze": "head_only"}):
        build_config(ExperimentConfig, {"training": {"batch_size": 1}, "model": model})


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:0", "127.0.0.1:99999", "ray://:10001", "127.0.0.1:1"])
def test_an_address_without_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--ray-address"):
        Resources(2, ray_address=address).check()


def test_an_address_at_which_something_listens_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        Resources(2, ray_address=f"ray://127.0.0.1:{server.getsockname()[1]}").check()


def test_a_share_of_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "count_gpus", lambda: 0)
    with pytest.raises(ConfigError, match="none is there"):
        Resources(2, client_gpus=0.25).check()
    monkeypatch.setattr(superlink, "count_gpus", lambda: 1)
    Resources(2, client_gpus=0.25).check()
    with pytest.raises(ConfigError, match="1 is there"):
        Resources(2, client_gpus=2).check()


@pytest.mark.slow
@pytest.mark.parametrize("word", sorted(REFUSED))
def test_the_command_says_so_in_one_sentence(word: str, tmp_path: Path) -> None:
    call = "from pneumofed.cli.main import main; main()"
    command = [sys.executable, "-c", call, "simulate", "--out", str(tmp_path / "run"), *REFUSED[word]]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert word in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
