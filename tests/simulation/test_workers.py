"""Worker processes: each message is answered as in this process, and a worker that dies costs one answer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.ops.processes import descendants
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ARRAYS, ModelArrays
from pneumofed.server.federation.messaging import ASKED_AT_ONCE, Messenger
from pneumofed.server.runs.events import Activity
from pneumofed.simulation import local_grid
from pneumofed.simulation.workers import HospitalWorkers, SharedArrays, no_collections, take_identity

PATIENCE_SEC = 60


@pytest.fixture(scope="module")
def workers() -> Iterator[HospitalWorkers]:
    take_identity()
    with HospitalWorkers(2) as started:
        yield started


def context(sites: Path) -> Context:
    return Context(1, 1000, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {"sites": str(sites)})


def message() -> Message:
    arrays = ModelArrays(np.zeros(10, np.float32), np.zeros(2, np.float32))
    return Message(pack_instruction(Instruction(ExperimentConfig(), "0" * 16, 1, arrays, None)), 1000, MessageType.TRAIN)


def replies(futures: list[Future[Message]]) -> list[Message]:
    return [future.result(PATIENCE_SEC) for future in futures]


def folder_of(workers: HospitalWorkers) -> Path:
    return workers._folder


def processes(workers: HospitalWorkers) -> set[int]:
    return set(descendants(workers._process.pid))


def test_a_worker_answers_as_the_app_in_this_process_does(workers: HospitalWorkers, tmp_path: Path) -> None:
    """There is no site here, which the app says in its reply."""
    from pneumofed.client.app import app

    asked = message()
    here = app(asked, context(tmp_path))
    there = workers.answer(asked, context(tmp_path)).result(PATIENCE_SEC)
    assert here.error.code == there.error.code and here.error.reason == there.error.reason
    assert there.metadata.reply_to_message_id == here.metadata.reply_to_message_id


def test_nothing_is_left_of_answered_messages(workers: HospitalWorkers, tmp_path: Path) -> None:
    replies([workers.answer(message(), context(tmp_path)) for _ in range(5)])
    deadline = time.monotonic() + 5
    while (left := [path.name for path in folder_of(workers).iterdir()]) != ["workers"] and time.monotonic() < deadline:
        time.sleep(0.02)  # the files go in the thread that took the reply
    assert left == ["workers"]


def test_a_worker_that_is_killed_costs_the_answer_that_it_was_working_on(workers: HospitalWorkers, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.yaml")  # reading the site's configuration waits for a writer
    working = [workers.answer(message(), context(tmp_path)) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE_SEC
    while len(processes(workers)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert not any(future.done() for future in working)
    for pid in processes(workers):
        os.kill(pid, signal.SIGKILL)
    assert {reply.error.reason for reply in replies(working)} == {"the worker process died"}
    (tmp_path / "0.yaml").unlink()
    after = workers.answer(message(), context(tmp_path)).result(PATIENCE_SEC)
    assert after.has_error() and after.error.reason != "the worker process died"


def test_workers_end_with_their_block(tmp_path: Path) -> None:
    take_identity()
    with HospitalWorkers(1) as started:
        replies([started.answer(message(), context(tmp_path))])
        folder, pids = folder_of(started), processes(started)
        assert pids
    assert not folder.exists()
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


def test_a_reply_is_given_to_the_pull_that_waits_for_it(
    workers: HospitalWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that came back at once with nothing would leave it to the caller how late he hears of a reply."""
    monkeypatch.setattr(local_grid, "LONGEST_PULL_SEC", PATIENCE_SEC)
    grid = local_grid.LocalGrid(None, [{"partition-id": 0}], {"sites": str(tmp_path)}, workers=workers)
    os.mkfifo(tmp_path / "0.yaml")  # reading the site's configuration waits for a writer
    sent = list(grid.push_messages([message()]))
    writer = threading.Timer(0.1, lambda: (tmp_path / "0.yaml").write_text("no: site\n"))
    writer.start()
    assert [reply.has_error() for reply in grid.pull_messages(sent)] == [True]
    assert not list(grid.pull_messages(sent))
    writer.join()


class SlowWorkers:
    """Two workers, each of which takes a while for a message, and how many of their replies wait to be taken."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.done, self.threads = seconds, 0, ThreadPoolExecutor(2)

    def answer(self, asked: Message, _: Context) -> Future[Message]:
        return self.threads.submit(self.work, asked)

    def work(self, asked: Message) -> Message:
        time.sleep(self.seconds)
        self.done += 1
        return Message(RecordDict(), reply_to=asked)


def test_replies_do_not_pile_up_where_many_are_asked_for_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_identity()
    monkeypatch.setattr(local_grid, "LONGEST_PULL_SEC", 0.05)
    slow, most = SlowWorkers(0.1), 0
    grid = local_grid.LocalGrid(None, [{"partition-id": 0}], {}, workers=cast("HospitalWorkers", slow))
    messenger = Messenger(grid, Activity(tmp_path / "events.jsonl"))
    left = list(grid.push_messages([message() for _ in range(40)]))
    while left:
        for reply in messenger.pull(left, ASKED_AT_ONCE):
            left.remove(reply.metadata.reply_to_message_id)
            most = max(most, slow.done - (40 - len(left)))
    assert most <= 4  # of 2 workers; all but a few wherever the grid waits for those only that are asked for


def test_the_collector_is_held_off_in_the_block_and_is_then_as_it_was() -> None:
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_simulation_loads_torch_behind_the_start_of_its_workers() -> None:
    code = "import sys, pneumofed.simulation.runner; print(*({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_SEC)
    assert not done.stdout.split()


def test_messages_share_the_file_of_an_array_that_both_hold(tmp_path: Path) -> None:
    shared, array = SharedArrays(tmp_path), Array(np.arange(3.0))
    other = ArrayRecord({ARRAYS: Array(np.arange(3.0))})[ARRAYS]
    first, second, third = shared.store(array), shared.store(array), shared.store(other)
    assert first == second != third and len(list(tmp_path.iterdir())) == 2
    shared.release([first])
    assert Path(second).exists()
    shared.release([second, third])
    assert not list(tmp_path.iterdir()) and shared.find(array) is None
