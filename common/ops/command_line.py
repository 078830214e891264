"""What all commands share: where they print, JSON, exit codes, options, and how an error or Ctrl-C ends them."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from pneumofed.common.errors import ConfigError, PneumofedError, printable


class _Printable(RenderHook):
    """Shows control characters as escapes in whatever is printed: text of users and of the other side never commands the terminal."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


@dataclass(frozen=True)
class _Escaped:
    shown: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.shown, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def open_console(**settings: Any) -> Console:
    """Builds a console that shows text as it is, without markup, and control characters in it as escapes.

    Args:
        **settings: Rich's, such as `stderr`.
    """
    made = Console(**{"highlight": False, "soft_wrap": True, "markup": False, "emoji": False, **settings})
    made.push_render_hook(_Printable())
    return made


console = open_console()
"""For people, on standard output. Text is shown as it is: names and paths of users may hold brackets and colons."""
errors = open_console(stderr=True)
"""For errors and notes, on standard error, so that they never get into a result that is piped on."""

FAILURE = 1
"""The command failed, or what it was to check does not hold: a broken log or ledger, a run that failed, no usable image."""
USAGE_ERROR = 2
"""The command or a configuration is wrong; Typer's own code for a wrong command too."""
NOT_RUNNING = 3
"""Of `site status`: no SuperNode runs, as the init scripts of Linux have it (LSB 5, status)."""
UNREACHABLE = 3
"""Of `site data`: the archive cannot be reached or refused."""
SOME_UNREADABLE = 3
"""Of `predict`: some of the files could not be read."""
REFUSED = 4
"""Of `release`: the model is not released."""
NOT_FOUND = 5
"""Of `site data remove`: a patient of the list has no image here."""
ALARM = 20
"""Of `monitor check` and `monitor compare`: something has moved."""
INTERRUPTED = 130
"""Stopped by Ctrl-C or SIGTERM: 128 and the number of SIGINT, as shells have it."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress: the result and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Site = Annotated[Path, typer.Option("--site", "-C", help="The site folder.")]
BundlePath = Annotated[Path, typer.Option("--bundle", help="The model bundle: a folder or an archive.")]
Trusted = Annotated[
    list[Path] | None, typer.Option("--trusted", help="Public key whose signature is taken; may repeat.", show_default="any")
]

PointFile = Annotated[
    Path | None,
    typer.Option("--operating-point", help="A hospital's own threshold: the file of `pneumofed site operating-point`."),
]


def say(text: str, style: str | None = None) -> None:
    """Prints a line for people on standard output."""
    console.print(text, style=style)


def note(text: str, style: str | None = "yellow") -> None:
    """Prints a line on standard error."""
    errors.print(text, style=style)


def print_json(values: Any, indent: int = 2) -> None:
    """Prints `values` as JSON on standard output: NaN and infinity as null, dataclasses as objects, what JSON does not know as text.

    Args:
        values: dicts, lists and dataclasses of plain values.
        indent: spaces a level.
    """
    from pneumofed.common.evaluation.metrics import without_nan  # NumPy, which only those who want JSON load

    typer.echo(json.dumps(without_nan(values), default=_plain, indent=indent))


def exit_code_of(error: PneumofedError) -> int:
    """The exit code of a command that ended with `error`."""
    return USAGE_ERROR if isinstance(error, ConfigError) else FAILURE


def read_pairs(options: Sequence[str] | None, name: str) -> dict[str, str]:
    """Reads options of the form NAME=VALUE.

    Args:
        options: texts; None for none. Of equal names the last counts.
        name: of the option, for the error.

    Raises:
        ConfigError: a text has no equals sign.
    """
    for option in options or ():
        if "=" not in option:
            raise ConfigError(f"{name} {option}: expected NAME=VALUE")
    return dict(option.split("=", 1) for option in options or ())


@contextmanager
def exit_on_error(code_of: Callable[[PneumofedError], int] = exit_code_of, *, as_json: bool = False) -> Iterator[None]:
    """Ends the process with one sentence on standard error and an exit code. Errors that are not ours keep their trace: they are bugs.

    Args:
        code_of: gives the exit code of an error.
        as_json: prints the error's class and text as JSON on standard output too.

    Raises:
        SystemExit: after one of our errors, or a KeyboardInterrupt.
    """
    try:
        with exit_when_stopped(lambda: "pneumofed: stopped"):
            yield
    except PneumofedError as error:
        if as_json:
            print_json({"error": type(error).__name__, "message": str(error)}, indent=1)
        note(f"pneumofed: {error}", style="red")
        raise SystemExit(code_of(error)) from None


def take_stop_signals() -> None:
    """Lets SIGTERM and SIGINT end the process by a KeyboardInterrupt that is not lost, wherever the main thread is at that moment.

    SIGTERM is taken as Ctrl-C, so that what a service manager stops also ends its own processes and says `stopped`. Python throws an
    exception away where nobody could catch it (in a finalizer, or in a callback of a C library, as while libraries are imported) and
    prints a trace: such an interrupt is raised again a moment later instead.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    before = sys.unraisablehook

    def again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            main = threading.main_thread().ident
            raising = threading.Timer(
                0.02, signal.pthread_kill, (main, signal.SIGTERM)
            )  # at once it would be lost in this function
            raising.daemon = True
            raising.start()
        else:
            before(lost)

    sys.unraisablehook = again


@contextmanager
def exit_when_stopped(sentence: Callable[[], str], to: Console = errors) -> Iterator[None]:
    """Ends the process with `INTERRUPTED` and a sentence after a KeyboardInterrupt, which Typer would end without a word.

    Args:
        sentence: what there is of the work that was stopped; asked for at that moment.
        to: where it is printed.

    Raises:
        SystemExit: after a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        to.print(sentence(), style="yellow")
        raise SystemExit(INTERRUPTED) from None


def _plain(value: object) -> object:
    return vars(value) if is_dataclass(value) else str(value)
