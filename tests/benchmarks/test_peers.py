"""The systems of `benchmarks.peers` do the same work, and the table says what the recorded turns say."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from benchmarks.peers import bare
from benchmarks.peers.measure import ROOT, environment, largest_difference, memory_bytes, pneumofed_command, pneumofed_results
from benchmarks.peers.prepare import prepare
from benchmarks.peers.table import Turn, build_tables, later_round, read_turns
from benchmarks.peers.work import BYTES_FILE, FINAL_FILE, RESULT_FILE, Recipe, State, Work, auroc, mean_state
from pneumofed.simulation.local_grid import LocalGrid

RECIPE = Recipe("small_cnn", 32, rounds=2, batch_size=9, learning_rate=0.01, momentum=0.9, seed=0, parallel=2)
"""No batch is smaller than 7 images: BatchNorm over a last batch of two enlarges roundings a thousandfold."""
ROUNDING = 1e-5
"""Far above what sums in another order differ by here, and far below what one other batch would change."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return prepare(None, 36, 2, RECIPE, tmp_path_factory.mktemp("peers") / "work")


@pytest.fixture(scope="module")
def loop(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The turn's folder of the bare loop."""
    folder = tmp_path_factory.mktemp("bare")
    bare.run(work, folder, processes=1)
    return folder


def final_state(folder: Path) -> State:
    state: State = torch.load(folder / FINAL_FILE, weights_only=True)
    return state


def area(folder: Path) -> float:
    return float(json.loads((folder / RESULT_FILE).read_text())["auroc"])


def test_every_image_is_in_one_hospital_once_and_in_one_batch_a_round(work: Work) -> None:
    assert Work.read(work.folder) == work
    rows = [row for one in work.hospitals for row in (*one.train, *one.validation)]
    assert sorted(rows) == list(range(len(work.images)))
    for one in work.hospitals:
        assert len(one.batches) == RECIPE.rounds and one.validation
        assert all(sorted(row for batch in batches for row in batch) == one.train for batches in one.batches)


def test_a_plain_flower_app_gives_the_weights_of_the_bare_loop(work: Work, loop: Path, tmp_path: Path) -> None:
    from benchmarks.peers.flower_app import client_app, server_app

    config: Any = {"work": str(work.folder), "turn": str(tmp_path)}
    grid = LocalGrid(client_app, [{"partition-id": number} for number in range(len(work.hospitals))], config)
    server_app(grid, Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), config))
    assert largest_difference(final_state(tmp_path), final_state(loop)) < ROUNDING
    assert area(tmp_path) == area(loop)
    messages = [tuple(map(int, line.split())) for line in (tmp_path / BYTES_FILE).read_text().splitlines()]
    weights = sum(tensor.nbytes for tensor in final_state(loop).values())
    assert len(messages) == 2 * RECIPE.rounds * len(work.hospitals)  # to train, and to evaluate
    assert all(weights <= down < 1.1 * weights and up in (0, down) for down, up in messages)


def test_pneumofed_gives_the_weights_of_the_bare_loop_on_the_same_images(work: Work, loop: Path, tmp_path: Path) -> None:
    from pneumofed.cli.main import app

    command = pneumofed_command(work, tmp_path / "run")[3:]  # without `python -m pneumofed.cli.main`
    done = CliRunner().invoke(app, [*command, "--engine", "local", "--workers", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    down, up, test_area, final = pneumofed_results(work, tmp_path / "run")
    assert largest_difference(final, final_state(loop)) < ROUNDING
    assert test_area == pytest.approx(area(loop), abs=1e-9)
    assert up <= down < 2 * up  # the judged model is kept for the next round


def test_other_batches_give_other_weights_by_far_more_than_rounding(work: Work, loop: Path, tmp_path: Path) -> None:
    other = prepare(None, 36, 2, Recipe(**{**RECIPE.__dict__, "seed": 1}), tmp_path / "work")
    bare.run(other, tmp_path, processes=1)
    assert largest_difference(final_state(tmp_path), final_state(loop)) > 100 * ROUNDING


@pytest.mark.slow
@pytest.mark.skipif(
    os.cpu_count() != 2, reason="pneumofed's Flower engine runs as many hospitals as there are CPUs, and this test two"
)
def test_the_whole_bench_runs_each_system_in_its_own_processes(tmp_path: Path) -> None:
    """NVFlare where PNEUMOFED_NVFLARE_PYTHON names a Python that has it, or this one does."""
    python = os.environ.get("PNEUMOFED_NVFLARE_PYTHON") or (sys.executable if importlib.util.find_spec("nvflare") else None)
    systems = ["bare-1", "bare-n", "flower", "pneumofed-local", "pneumofed-flower", *(["nvflare"] if python else [])]
    options = "--phantoms --images 36 --hospitals 2 --rounds 2 --turns 1 --model small_cnn --image-size 32 --batch-size 9"
    command = ["-m", "benchmarks.peers", *options.split(" ")]
    command += ["--out", str(tmp_path), "--systems", *systems, *(["--nvflare-python", python] if python else [])]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    turns = read_turns(next(tmp_path.glob("*/turns.jsonl")))
    assert {turn.system for turn in turns} == set(systems)
    assert max(turn.auroc for turn in turns) - min(turn.auroc for turn in turns) < 0.01  # near ties
    for turn in turns[1:]:
        assert turn.difference is not None and turn.difference < ROUNDING
        assert 0 < turn.first < turn.wall and turn.end > 0 and turn.later > 0 and turn.peak_bytes > 1e8


@pytest.mark.slow
def test_the_probe_writes_every_optimizer_step_of_a_process(tmp_path: Path) -> None:
    code = (
        "import torch; p = torch.nn.Parameter(torch.ones(1)); o = torch.optim.SGD([p], lr=0.1);"
        "p.grad = torch.ones(1); [o.step() for _ in range(3)]"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), check=True, timeout=120)
    times = [float(line) for line in (tmp_path / "steps.txt").read_text().split()]
    assert len(times) == 3 and times == sorted(times)


def test_a_later_round_is_from_its_first_step_to_the_next_ones() -> None:
    steps = [10.0, 11.0, 20.0, 22.0, 27.0, 28.0, 35.0, 36.0]  # rounds of two steps begin at 10, 20, 27 and 35
    assert later_round(steps, 2) == 7.5
    assert later_round(steps[:4], 2) == 10.0
    with pytest.raises(ValueError, match="no two or more rounds"):
        later_round(steps[:3], 2)


def recorded(system: str, turn: int, wall: float, **more: Any) -> Turn:
    facts: dict[str, Any] = {"first": 3.0, "later": 2.0, "end": 1.0, "peak_bytes": 2e9, "down": None, "up": None, "auroc": 0.75}
    return Turn(system, 4, turn, 2, wall, **{**facts, "difference": None, **more})


def test_the_table_has_medians_ratios_and_what_each_system_sends(tmp_path: Path) -> None:
    walls = {"bare-n": (10.0, 12.0, 11.0), "pneumofed-local": (11.0, 13.0, 12.1)}
    turns = [recorded(name, turn, wall) for name, own in walls.items() for turn, wall in enumerate(own, start=1)]
    turns.append(recorded("flower", 1, 22.0, down=90e6, up=45e6, difference=2e-7))
    file = tmp_path / "turns.jsonl"
    file.write_text("".join(turn.line() for turn in turns))
    assert read_turns(file) == turns
    lines = build_tables(read_turns(file)).splitlines()
    assert lines[0] == "**4 hospitals, 3 turns**"
    assert (
        lines[4] == "| bare loop, 2 at once | 11.0 (10.0 to 12.0) | 1.00 | 3.0 | 2.0 | 1.0 | 2.00 | none | none | 0.7500 | none |"
    )
    assert lines[5] == "| plain Flower app | 22.0 | 2.00 | 3.0 | 2.0 | 1.0 | 2.00 | 90.0 | 45.0 | 0.7500 | 2e-07 |"
    assert lines[6].startswith("| pneumofed `--engine local` | 12.1 (11.0 to 13.0) | 1.10 |")


def test_memory_is_that_of_the_processes_and_of_shared_files_that_none_has_mapped() -> None:
    own = memory_bytes({os.getpid()}, shared=0)
    with mmap.mmap(
        -1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as fresh:  # what malloc gives may be there already
        fresh.write(bytes([1]) * len(fresh))
        assert memory_bytes({os.getpid()}, shared=0) - own > 0.9 * len(fresh)
    assert memory_bytes(set(), shared=7) == 7


def test_areas_are_those_of_scikit_learn_also_with_ties() -> None:
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, 200), random.integers(0, 20, 200).astype(np.float32)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_the_mean_weighs_by_images() -> None:
    one, other = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 6.0])}
    assert mean_state([(one, 3), (other, 1)])["w"].tolist() == [2.0, 3.0]
