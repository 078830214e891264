"""Promise: a judgement is of the image that was sent. Attack: jobs that come while the workers start, and replies out of turn."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.inference.reading_room import worker as worker_module
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE
from pneumofed.inference.reading_room.worker import READY, Read, Reply, Worker, Workers
from tests.adversary.answers import FAST, load_at_once, load_slowly
from tests.inference.reading_room.stage import Stage, phantom_png, problem

JOBS = 12


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "get_context", lambda _: FAST)


def jobs(folder: Path) -> list[ImageJob]:
    found = []
    for number in range(JOBS):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        (place / ORIGINAL_FILE).write_bytes(f"image {number}".encode())
        found.append(ImageJob(place))
    return found


async def answers_while_starting(load: Callable[[], Read], work: list[ImageJob]) -> list[str]:
    """What two workers say of each job when the jobs come at the moment of their start."""
    workers = Workers([Worker(load, memory_mb=512, limit_sec=20.0) for _ in range(2)])

    async def ask(job: ImageJob) -> str:
        try:
            await workers.run(job)
        except ImageError as error:
            return error.detail
        return "no error"

    try:
        started = asyncio.ensure_future(workers.start())
        said = await asyncio.gather(*(ask(job) for job in work))
        await started
        assert workers.ready
        return said
    finally:
        workers.close()


def start_and_ask(starts: int, folder: Path) -> None:
    work = jobs(folder)
    wanted = [hashlib.sha256((job.folder / ORIGINAL_FILE).read_bytes()).hexdigest() for job in work]
    for number in range(starts):
        load = load_slowly if number % 2 else load_at_once
        assert asyncio.run(answers_while_starting(load, work)) == wanted


def test_jobs_that_come_while_workers_start_get_their_own_answers(fast: None, tmp_path: Path) -> None:
    start_and_ask(25, tmp_path)


@pytest.mark.slow
def test_a_thousand_starts_with_interleaved_jobs(fast: None, tmp_path: Path) -> None:
    start_and_ask(1000, tmp_path)


def serve_another(change: Callable[[Reply], Any]) -> Callable[..., None]:
    """A process that changes each reply."""

    def serve(connection: Connection, load: Callable[[], Read], _: int) -> None:
        read = load()
        connection.send(READY)
        while True:
            question = connection.recv()
            connection.send(change(Reply(question.number, question.sha256, read(question.job))))

    return serve


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: Reply(reply.number - 1, reply.sha256, reply.outcome),
        lambda reply: Reply(reply.number, "0" * 64, reply.outcome),
        lambda reply: reply.outcome,
        lambda _: READY,
    ],
    ids=["of the question before", "of another file", "without a question", "of a start"],
)
def test_a_reply_to_another_question_is_refused_and_the_process_replaced(
    change: Callable[[Reply], Any], fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job, *_) = jobs(tmp_path)
    worker = Worker(load_at_once, memory_mb=512, limit_sec=20.0)
    real = worker_module._serve
    try:
        monkeypatch.setattr(worker_module, "_serve", serve_another(change))
        refused = worker(job)
        assert isinstance(refused, ImageError) and refused.reason == SkipReason.UNREADABLE
        assert refused.detail == "got the reply to another question"
        monkeypatch.setattr(worker_module, "_serve", real)
        answered = worker(job)
        assert isinstance(answered, ImageError) and answered.detail == hashlib.sha256(b"image 0").hexdigest()
    finally:
        worker.close()


def test_before_the_model_can_judge_the_answer_is_503_with_the_time_to_try_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    token = {"Authorization": f"Bearer {stage.room.users.add_token('ris')}"}
    with stage.signed_in() as client:
        stage.room.workers.ready = False  # only now: the start of the application sets it
        for answer in (
            client.post("/api/cases", files=[("files", ("image", phantom_png()))]),
            client.post("/api/predict", content=phantom_png(), headers=token),
            client.post("/api/explain", content=phantom_png(), headers=token),
        ):
            assert problem(answer) == (503, "not_ready")
            assert int(answer.headers["Retry-After"]) == answer.json()["retry_sec"] > 0
        stage.room.workers.ready = True
        assert client.post("/api/predict", content=phantom_png(), headers=token).status_code == 200
    stage.room.close()
