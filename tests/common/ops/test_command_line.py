"""What all commands share: text as it is, JSON, and the end by an error or Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pneumofed.common.errors import ConfigError, DataError, PneumofedError
from pneumofed.common.ops.command_line import (
    FAILURE,
    INTERRUPTED,
    UNREACHABLE,
    USAGE_ERROR,
    console,
    exit_on_error,
    exit_when_stopped,
    note,
    print_json,
    say,
)


@pytest.mark.parametrize("text", ["[red]north[/red]", ":warning: south", "a" * 300, "[/]"])
def test_text_of_users_is_shown_as_it_is_and_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    note(text)
    assert tuple(capsys.readouterr()) == (f"{text}\n", f"{text}\n")


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def test_json_knows_dataclasses_and_has_null_for_what_it_cannot_say(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"path": Path("a"), "none": float("nan"), "most": [float("inf"), 1.5], "range": Interval(0.1, 0.2)})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"path": "a", "none": None, "most": [None, 1.5], "range": {"low": 0.1, "high": 0.2}}
    assert "NaN" not in printed


@pytest.mark.parametrize(("error", "code"), [(ConfigError("no [file]"), USAGE_ERROR), (DataError("damaged"), FAILURE)])
def test_an_error_of_ours_is_one_sentence_and_a_code(
    error: PneumofedError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise error
    assert ended.value.code == code
    assert tuple(capsys.readouterr()) == ("", f"pneumofed: {error}\n")


def test_a_command_may_have_codes_of_its_own_and_print_the_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error(lambda _: UNREACHABLE, as_json=True):
        raise DataError("damaged")
    assert ended.value.code == UNREACHABLE
    assert json.loads(capsys.readouterr().out) == {"error": "DataError", "message": "damaged"}


def test_bugs_keep_their_trace() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_error():
        _ = 1 / 0


def test_what_was_stopped_says_so_on_either_stream(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    with pytest.raises(SystemExit) as ended, exit_when_stopped(lambda: f"stopped after {len(done)}"):
        done.append(1)
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), exit_when_stopped(lambda: "goes on", console):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), exit_on_error():
        raise KeyboardInterrupt
    assert ended.value.code == INTERRUPTED
    assert tuple(capsys.readouterr()) == ("goes on\n", "stopped after 1\npneumofed: stopped\n")


FINALIZER = """
import signal, time
from pneumofed.common.ops.command_line import exit_on_error, take_stop_signals

class Stopped:
    def __del__(self):
        signal.raise_signal({sign})

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
take_stop_signals()
with exit_on_error():
    Stopped()
    time.sleep(60)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_finalizer_still_ends_the_command(sign: signal.Signals) -> None:
    """Python throws away what a finalizer raises, with a trace."""
    ended = subprocess.run([sys.executable, "-c", FINALIZER.format(sign=int(sign))], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (INTERRUPTED, "pneumofed: stopped\n")
