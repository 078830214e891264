"""A state file holds the old value or the new one, loses no update, and says which kind of file is damaged."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.client.data.readings import Readings
from pneumofed.client.data.readings import forget_readings as forget_readings
from pneumofed.client.federation.site_data import forget_split as forget_split
from pneumofed.common.errors import DataError, PneumofedError
from pneumofed.common.files import StateFile, drawn_once

SPAWN = multiprocessing.get_context("spawn")
JSON = st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=4)
UPDATES = 25


def counter(folder: Path) -> StateFile[int]:
    return StateFile(
        folder / "count.json", "the count of rounds", lambda content: int(json.loads(content)), 0, "count anew", DataError
    )


def count_up(folder: Path) -> None:
    for _ in range(UPDATES):
        with counter(folder).locked() as value:
            counter(folder).write(value + 1)


def write_and_die(folder: Path, last_call: str) -> None:
    """Writes 2 and is killed where `last_call` of the writing would come."""
    owner = Path if last_call == "replace" else os
    setattr(owner, last_call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with counter(folder).locked():
        counter(folder).write(2)


@settings(max_examples=30, deadline=None)
@given(JSON, JSON)
def test_the_last_value_comes_back_and_only_the_owner_may_read_it(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, object], second: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("state") / "state.json"
    file: StateFile[dict[str, object]] = StateFile(path, "a state", json.loads, {"never": "written"}, "", DataError)
    assert file.read() == {"never": "written"}
    for value in (first, second):
        file.write(value)
        assert file.read() == value
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.parent.iterdir()) == [path.with_name(".state.json.sum"), path]


def test_two_writers_lose_no_update(tmp_path: Path) -> None:
    writers = [SPAWN.Process(target=count_up, args=(tmp_path / "new",)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert counter(tmp_path / "new").read() == 2 * UPDATES


@pytest.mark.parametrize("last_call", ["fsync", "replace"])
def test_a_kill_before_the_end_leaves_the_old_value_and_no_lock(tmp_path: Path, last_call: str) -> None:
    counter(tmp_path).write(1)
    writer = SPAWN.Process(target=write_and_die, args=(tmp_path, last_call))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    with counter(tmp_path).locked() as value:
        assert value == 1


def test_a_value_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file: StateFile[object] = StateFile(tmp_path / "state.json", "a state", json.loads, None, "", DataError)
    file.write("old")
    with pytest.raises(TypeError):
        file.write(object())
    assert file.read() == "old"


@settings(max_examples=50, deadline=None)
@given(st.binary())
def test_other_content_is_a_value_or_damage_of_that_kind(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = counter(tmp_path_factory.mktemp("state"))
    file.path.write_bytes(content)
    try:
        assert isinstance(file.read(), int)
    except DataError as error:
        assert str(error).startswith(f"{file.path}, the count of rounds, is damaged (") and str(error).endswith("; count anew")


def test_a_file_that_can_be_had_again_counts_as_missing_when_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file: StateFile[object] = StateFile(tmp_path / "memo.json", "the memo", json.loads, {}, "it is made again")
    file.path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert file.read() == {}
    assert "the memo, is damaged (JSONDecodeError); it is made again" in caplog.text


@pytest.mark.parametrize("refuse", [None, DataError])
def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, refuse: type[PneumofedError] | None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.json").mkdir()  # stands for any file that the system does not let us read, also for root
    file: StateFile[object] = StateFile(tmp_path / "state.json", "a state", json.loads, None, "remove it", refuse)
    try:
        assert file.read() is None and refuse is None
        said = caplog.text
    except DataError as error:
        said = str(error)
    assert "a state, cannot be read: Is a directory" in said and "remove it" not in said


@pytest.mark.parametrize("name", ["split.json", "readings.json"])
@pytest.mark.parametrize("content", ['{"0 0.2": {"DOE^JANE": tru', '{"DOE^JANE": ["DOE^JANE"]}', '["DOE^JANE"]'])
def test_damage_of_a_file_that_names_patients_names_none(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="the list of") as caught:
        (forget_split if name == "split.json" else forget_readings)(tmp_path, lambda _: False)
    assert "DOE" not in str(caught.value) and caught.value.__cause__ is None


def test_readings_keep_their_format(tmp_path: Path) -> None:
    known = {"ab" * 32: {"patient": "P1", "path": None, "original": "normal", "readings": [
        {"reader": "r1", "time": "2026-01-31T09:15:02Z", "label": "viral", "case": ""}]}}  # fmt: skip
    (tmp_path / "readings.json").write_text(json.dumps(known))
    Readings.of(tmp_path).write(tmp_path)
    assert json.loads((tmp_path / "readings.json").read_text()) == known


def test_a_key_is_drawn_once_and_never_replaced(tmp_path: Path) -> None:
    drawn = [drawn_once(tmp_path / "new" / "key", lambda: os.urandom(32)) for _ in range(3)]
    assert len(set(drawn)) == 1 and (tmp_path / "new" / "key").stat().st_mode & 0o777 == 0o600
