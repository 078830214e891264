"""Progress: what a line says, when one is printed, and that nothing gets into a result that is piped on."""

from __future__ import annotations

import io
import time

import pytest

from pneumofed.common.ops.command_line import open_console
from pneumofed.common.ops.progress import Lines, ProgressStep, say_seconds, show_sentences


def test_the_time_left_is_that_of_the_pace_since_the_first_report() -> None:
    step = ProgressStep("run", started=100.0, first=6.0, done=8.0, total=12.0)  # a resumed run had done six rounds before
    assert step.left_sec(160.0) == pytest.approx(120.0)
    assert step.line(160.0) == "run: 8 of 12, 60 s so far, about 2 min left"
    assert ProgressStep("run", 100.0, total=12.0).left_sec(160.0) is None
    assert ProgressStep("images", 0.0, done=5.0).line(3.0) == "images: 5, 3 s so far"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7199, "2 h 00 min"), (9060, "2 h 31 min")]
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert say_seconds(seconds) == words


def test_lines_come_while_a_step_runs_also_when_nothing_moves_and_stop_with_it() -> None:
    out = io.StringIO()
    lines = Lines(open_console(file=out))
    lines.every_sec = 0.01
    with lines as progress:
        progress.show("images [a]", 1, 4)
        _wait_for(lambda: out.getvalue().count("images [a]: 1 of 4") >= 2)
        progress.finish("images [a]")
        time.sleep(0.05)
        said = out.getvalue()
        time.sleep(0.05)
        assert out.getvalue() == said
        progress.finish("never began")


def test_a_step_of_which_all_is_done_ends_where_another_begins() -> None:
    lines = Lines(open_console(file=io.StringIO()))
    for step, done in (("files read", 7), ("run", 1), ("files read", 8), ("images decoded", 1)):
        lines.show(step, done, 8)
    assert list(lines.steps) == ["run", "images decoded"]


def test_a_sentence_is_said_once_and_is_the_state_of_a_step_that_ends_with_its_block() -> None:
    lines = Lines(open_console(file=io.StringIO()))
    said: list[str] = []
    with pytest.raises(ValueError, match="no"), show_sentences(lines, "export", said.append) as say:
        say("checking the graph")
        assert said == ["checking the graph"] and lines.steps["export"].state == "checking the graph"
        raise ValueError("no")
    assert not lines.steps


def _wait_for(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
