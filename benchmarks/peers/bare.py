"""The bare loop: `python -m benchmarks.peers.bare WORK TURN PROCESSES`. One hospital after the other, or in so many processes at once.

What the same training costs with nothing around it: no messages, checks, records or names. Processes exchange weights as files in memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from benchmarks.peers.work import State, Work, evaluate, finish, first_network, load_state, mean_state, state_of, train


def run(work: Work, turn: Path, processes: int) -> None:
    """Trains and judges as every system does.

    Args:
        work: what is done.
        turn: folder for the result.
        processes: 1: all in this process.
    """
    network = first_network(work.recipe)
    if processes == 1:
        for number in range(1, work.recipe.rounds + 1):
            state = state_of(network)
            load_state(network, mean_state(_one_after_the_other(work, network, state, number)))
            for hospital in range(len(work.hospitals)):
                evaluate(work, network, hospital)
    else:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with (
            tempfile.TemporaryDirectory(prefix="peers-", dir=memory) as shared,
            ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool,
        ):
            for number in range(1, work.recipe.rounds + 1):
                _round(work, network, number, pool, Path(shared))
    finish(work, network, turn)


def _one_after_the_other(work: Work, network: nn.Module, state: State, number: int) -> Iterator[tuple[State, int]]:
    for hospital in range(len(work.hospitals)):
        load_state(network, state)
        images = train(work, network, hospital, number)
        yield state_of(network), images


def _round(work: Work, network: nn.Module, number: int, pool: Executor, shared: Path) -> None:
    torch.save(state_of(network), shared / "global.pt")
    places = [(str(work.folder), str(shared), hospital, number) for hospital in range(len(work.hospitals))]
    load_state(network, mean_state(_taken(file, images) for file, images in pool.map(_train, places)))
    torch.save(state_of(network), shared / "global.pt")
    list(pool.map(_evaluate, places))


def _taken(file: str, images: int) -> tuple[State, int]:
    state = torch.load(file, weights_only=True)
    Path(file).unlink()
    return state, images


@cache
def _held(folder: str) -> tuple[Work, nn.Module]:
    """Of a process: the work and a network, built once."""
    work = Work.read(folder)
    return work, first_network(work.recipe)


def _train(place: tuple[str, str, int, int]) -> tuple[str, int]:
    folder, shared, hospital, number = place
    work, network = _held(folder)
    load_state(network, torch.load(Path(shared) / "global.pt", weights_only=True, mmap=True))
    images = train(work, network, hospital, number)
    file = f"{shared}/{hospital}.pt"
    torch.save(state_of(network), file)
    return file, images


def _evaluate(place: tuple[str, str, int, int]) -> None:
    folder, shared, hospital, _ = place
    work, network = _held(folder)
    load_state(network, torch.load(Path(shared) / "global.pt", weights_only=True, mmap=True))
    evaluate(work, network, hospital)


if __name__ == "__main__":
    run(Work.read(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
