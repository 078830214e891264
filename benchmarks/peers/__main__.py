"""The same training on four systems, interleaved (A B C D, A B C D), with one table for each number of hospitals.

    python -m benchmarks.peers --data chest_xray --hospitals 4 --rounds 3
    python -m benchmarks.peers --data chest_xray --hospitals 4 20 100 --turns 2
    python -m benchmarks.peers --phantoms --images 48 --hospitals 2 --rounds 2 --model small_cnn --image-size 32

ResNet18 on 64 px, 1,200 images in all, FedAvg by images over one pass of SGD a round: the same images at each hospital, first weights,
batches and evaluations (`benchmarks/peers/work.py`). A machine with nothing else to do is needed. NVFlare has an environment of its own,
`--nvflare-python`, or one that is made below `--out` once, with this environment's packages behind it. Nothing is resumed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.peers.measure import Systems
from benchmarks.peers.prepare import prepare
from benchmarks.peers.table import NVFLARE_SYSTEMS, SYSTEMS, Turn, build_tables, read_turns
from benchmarks.peers.work import FINAL_FILE, Recipe
from pneumofed.server.runs.folder import describe_environment

NVFLARE = "nvflare==2.9.0"
TURNS_FILE = "turns.jsonl"
DEFAULT_SYSTEMS = tuple(name for name in SYSTEMS if name != "nvflare-all")  # which is as many processes as hospitals
SHOWN_PACKAGES = ("torch", "flwr", "ray", "numpy")


def nvflare_environment(out: Path) -> Path:
    """Makes NVFlare's environment unless it is there, and returns its Python.

    Args:
        out: the folder that it lies in.

    Raises:
        SystemExit: NVFlare cannot be installed.
    """
    folder = out / "nvflare-environment"
    python = folder / "bin" / "python"
    if has_nvflare(python):
        return python
    print(f"installing {NVFLARE} in {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    present = dict.fromkeys(path for path in sys.path if path.endswith("site-packages"))
    (site / "present.pth").write_text("".join(f"{path}\n" for path in present))
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", NVFLARE]
    if subprocess.run(command, check=False).returncode or not has_nvflare(python):
        raise SystemExit(
            f"{NVFLARE} cannot be installed; name a Python that has it with --nvflare-python, or leave it out of --systems"
        )
    return python


def has_nvflare(python: Path) -> bool:
    """Checks whether a Python exists and has NVFlare and torch."""
    code = "import importlib.util as u; raise SystemExit(not (u.find_spec('nvflare') and u.find_spec('torch')))"
    return python.exists() and subprocess.run([str(python), "-c", code], check=False, capture_output=True).returncode == 0


def run(options: argparse.Namespace, hospitals: int, folder: Path, nvflare_python: Path | None) -> Iterator[Turn]:
    """Measures all turns with so many hospitals.

    Args:
        options: of the command line.
        hospitals: how many.
        folder: is made; what a turn leaves is removed after it, but for its log.
        nvflare_python: see `Systems`.
    """
    recipe = Recipe(
        options.model, options.image_size, options.rounds, options.batch_size, options.learning_rate, options.momentum, options.seed,
        options.parallel,
    )  # fmt: skip
    work = prepare(options.data, options.images, hospitals, recipe, folder / "work")
    train, held = sum(len(one.train) for one in work.hospitals), sum(len(one.validation) for one in work.hospitals)
    print(
        f"{hospitals} hospitals, {train} training and {held} validation images, {work.steps_a_round} batches a round", flush=True
    )
    systems, base = Systems(work, nvflare_python, options.timeout), None
    for turn in range(1, options.turns + 1):
        for number, system in enumerate(options.systems, start=1):
            place = folder / f"{turn}-{system}"
            print(f"turn {turn} of {options.turns}, {number} of {len(options.systems)}: {system} ...", end=" ", flush=True)
            found = systems.measure(system, turn, place, base)
            if base is None and system.startswith("bare"):
                base = torch.load(place / FINAL_FILE, weights_only=True)
            _tidy(place)
            print(
                f"{found.wall:.1f} s, first batch {found.first:.1f} s, {found.peak_bytes / 1e9:.2f} GB, AUROC {found.auroc:.4f}",
                flush=True,
            )
            yield found
    shutil.rmtree(work.folder)


def _tidy(place: Path) -> None:
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix not in (".log", ".txt", ".json"):
            path.unlink()


def describe_machine(nvflare_python: Path | None) -> str:
    """Describes machine, versions, commit and date in a line of Markdown each.

    Args:
        nvflare_python: whose NVFlare is named too.
    """
    found = describe_environment()
    packages = {name: found["packages"].get(name) for name in SHOWN_PACKAGES} | {"NVFlare": _nvflare_version(nvflare_python)}
    git = found["git"] or {}
    lines = [
        f"{found['cpu']}, {found['cpus']} CPUs, {found['platform']}",
        "Python " + ", ".join([found["python"], *(f"{name} {version}" for name, version in packages.items() if version)]),
        f"commit {git.get('commit')}{' with changes' if git.get('dirty') else ''}, {datetime.now(UTC):%d %B %Y}",
        f"load of the machine at the end {os.getloadavg()[1]:.1f} (5 minutes)",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _nvflare_version(python: Path | None) -> str | None:
    if python is None:
        return None
    code = "from importlib.metadata import version; print(version('nvflare'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def build_parser() -> argparse.ArgumentParser:
    """Builds the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=lambda text: Path(text).resolve(), help="folder in the Kaggle layout, with train/ and test/"
    )
    source.add_argument("--phantoms", action="store_true", help="drawn images, for a trial of the benchmark")
    source.add_argument("--table", type=Path, help=f"only the table of a recorded {TURNS_FILE}")
    parser.add_argument("--images", type=int, default=1200, help="of all hospitals, training and validation")
    parser.add_argument("--hospitals", type=int, nargs="+", default=[4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=2, help="hospitals at once")
    parser.add_argument("--systems", nargs="+", choices=tuple(SYSTEMS), default=list(DEFAULT_SYSTEMS))
    parser.add_argument("--model", choices=("resnet18", "small_cnn"), default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds after which a system is ended, and the benchmark")
    parser.add_argument("--nvflare-python", type=Path, help="a Python that has NVFlare, this torch and what pneumofed needs")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuses what no system could do, before anything is done.

    Raises:
        SystemExit: names it.
    """
    if options.rounds < 2 or min(options.hospitals) < 2:
        raise SystemExit("at least two hospitals and two rounds are needed")
    if "pneumofed-flower" in options.systems and options.parallel != os.cpu_count():
        raise SystemExit(
            f"pneumofed's Flower engine runs as many hospitals at once as there are CPUs, {os.cpu_count()}: "
            "set --parallel to it, or leave pneumofed-flower out of --systems"
        )
    if options.nvflare_python and not has_nvflare(options.nvflare_python):
        raise SystemExit(f"{options.nvflare_python} has no NVFlare or no torch")


def main() -> None:
    options = build_parser().parse_args()
    if options.table:
        print(build_tables(read_turns(options.table)))
        return
    check(options)
    out = options.out.resolve()
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    python = None
    if set(NVFLARE_SYSTEMS) & set(options.systems):
        python = options.nvflare_python.absolute() if options.nvflare_python else nvflare_environment(out)
    turns = []
    for hospitals in options.hospitals:
        for turn in run(options, hospitals, folder / f"{hospitals}-hospitals", python):
            turns.append(turn)
            with (folder / TURNS_FILE).open("a") as file:
                file.write(turn.line())
    text = f"{build_tables(turns)}\n\n{describe_machine(python)}\n"
    (folder / "table.md").write_text(text)
    print(f"\n{text}\nthe logs are in {folder}")


if __name__ == "__main__":
    main()
