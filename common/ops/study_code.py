"""A study's own code: one Python file with a function that builds a network or a loss, and the hash by which it is known everywhere.

    my_net.py:build_net          what a researcher writes: a file and a function, or class, in it
    study:SHA256:build_net       what `model.name` or `loss.name` of the experiment then holds: SHA-256 of the file's bytes
    pneumofed/study_code/        folder of the app bundle in which the file travels, so that each hospital approves it with the bundle

An experiment names code and never holds any: a site has it only from the bundle that it approved (`client.site.code_gate`), and the
processes of a simulation from who started them (`remember`). Nothing here runs the code but `load_function`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pneumofed.common.config.experiment import STUDY_CODE, ExperimentConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import write_file

FOLDER = "study_code"
"""Of the app bundle below `pneumofed/`, and of a run folder."""
REFERENCE = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_]\w*)")
MAX_BYTES = 1 << 20
"""A network is written in thousands of bytes; a larger file is something else."""

_known: dict[str, StudyCode] = {}
_loading: list[str] = []


@dataclass(frozen=True)
class StudyCode:
    """One file of a study, and the function in it that is called.

    Attributes:
        file: its name without a folder, such as `my_net.py`.
        source: its bytes.
        function: name of a function or class at the top of the file.
    """

    file: str
    source: bytes
    function: str

    @property
    def digest(self) -> str:
        """SHA-256 of the file in hexadecimal, as `sha256sum` prints it."""
        return hashlib.sha256(self.source).hexdigest()

    @property
    def name(self) -> str:
        """What `model.name` or `loss.name` of an experiment holds."""
        return f"study:{self.digest}:{self.function}"

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


def is_study_code(name: str) -> bool:
    """Whether a name of a network or loss means a study's own code."""
    return STUDY_CODE.fullmatch(name) is not None


def describe_name(name: str) -> str:
    """Shortens the name of a network or loss for people: a study's own keeps twelve digits of its hash; others stay."""
    if not is_study_code(name):
        return name
    _, digest, function = name.split(":")
    return f"the study's own {function} (SHA-256 {digest[:12]})"


def read_study_code(reference: str) -> StudyCode:
    """Reads the file that `my_net.py:build_net` names and remembers it for this process; nothing of it runs.

    Raises:
        ConfigError: no such file, no Python, no such function in it, or it imports a file beside it, which hospitals would not get.
    """
    _refuse_in_its_own_file()
    found = REFERENCE.fullmatch(reference)
    if not found:
        raise ConfigError(f"{reference}: expected FILE.py:FUNCTION, e.g. my_net.py:build_net")
    path, function = Path(found["path"]), found["function"]
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; {reference} was to name a study's own code as FILE.py:FUNCTION") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    code = StudyCode(path.name, source, function)
    _check_source(code, path.parent)
    return remember(code)


def study_code_of(maker: Any) -> StudyCode:
    """Reads the file in which a function or class is defined, for callers that have the object itself.

    Raises:
        ConfigError: it is no function or class at the top of a file, as in a notebook or a console.
    """
    _refuse_in_its_own_file()
    name, file = getattr(maker, "__qualname__", ""), None
    with suppress(TypeError, OSError):
        file = inspect.getsourcefile(maker)
    if not callable(maker) or not name.isidentifier() or not file or not Path(file).is_file():
        raise ConfigError(
            f"model or loss: {name or type(maker).__name__} is no function or class at the top of a file, which alone can be given to "
            "hospitals; write it into a file of its own (in a notebook: %%writefile my_net.py) and give 'my_net.py:build_net'"
        )
    return read_study_code(f"{file}:{name}")


def remember(code: StudyCode) -> StudyCode:
    """Makes code known to this process, in which `find_study_code` then finds it by its name; returns it."""
    _known[code.name] = code
    return code


def remember_folder(folder: Path, names: Iterable[str]) -> None:
    """Makes known what a folder holds of the named code; a file that was changed has another hash and is not it.

    Args:
        folder: written by `write_codes`; it may be missing.
        names: of networks and losses; others than a study's own are passed over.
    """
    held = _files_in(folder)
    for name in names:
        if is_study_code(name) and name.split(":")[1] in held:
            path = held[name.split(":")[1]]
            remember(StudyCode(path.name, path.read_bytes(), name.split(":")[2]))


def find_study_code(name: str) -> StudyCode:
    """Finds the code of a name in what this process remembers, else in the app bundle that it runs from.

    Raises:
        ConfigError: it is in neither.
    """
    if name not in _known:
        remember_folder(Path(__file__).resolve().parents[2] / FOLDER, [name])
    if name in _known:
        return _known[name]
    raise ConfigError(
        f"{describe_name(name)} is no part of the code here: give its file again (--model FILE.py:FUNCTION), unchanged; a hospital has "
        "it only in the app bundle that it approved"
    )


def names_in(experiment: ExperimentConfig) -> tuple[str, ...]:
    """Lists the names of the study's own code that an experiment uses."""
    return tuple(name for name in (experiment.model.name, experiment.loss.name) if is_study_code(name))


def study_codes_of(experiment: ExperimentConfig) -> list[StudyCode]:
    """Finds all of the study's own code that an experiment uses.

    Raises:
        ConfigError: some of it is not here.
    """
    return [find_study_code(name) for name in names_in(experiment)]


def known_codes() -> list[StudyCode]:
    """Lists what this process remembers, to be remembered by one that it starts."""
    return list(_known.values())


def remember_all(codes: Iterable[StudyCode]) -> None:
    """Makes all of `codes` known to this process."""
    for code in codes:
        remember(code)


def with_study_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces `FILE.py:FUNCTION` in `model.name` and `loss.name` of nested values by the name of what the file holds.

    Raises:
        ConfigError: see `read_study_code`.
    """
    replaced = dict(values)
    for section in ("model", "loss"):
        given = replaced.get(section)
        name = given.get("name") if isinstance(given, Mapping) else None
        if isinstance(given, Mapping) and isinstance(name, str) and REFERENCE.fullmatch(name):
            replaced[section] = {**given, "name": read_study_code(name).name}
    return replaced


def write_codes(folder: Path, codes: Iterable[StudyCode]) -> None:
    """Writes each file into `folder`, made if there is one to write; two files of one name get a part of their hash into it.

    Args:
        folder: where `remember_folder` finds them.
        codes: none writes nothing.
    """
    for code in codes:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / code.file
        if path.exists() and path.read_bytes() != code.source:
            path = folder / f"{Path(code.file).stem}_{code.digest[:12]}.py"
        write_file(path, code.source)


def load_function(code: StudyCode) -> Callable[..., Any]:
    """Runs the file, once a process, and returns the function in it.

    Raises:
        ConfigError: the file raises, imports what is not installed, or defines no such function itself.
    """
    module = _run_file(code.file, code.source)
    found = getattr(module, code.function, None)
    if not callable(found) or getattr(found, "__module__", None) != module.__name__:
        raise ConfigError(f"{code.file} defines no function or class {code.function}")
    return found


def call_with(code: StudyCode, given: Mapping[str, Any]) -> Any:
    """Calls the code's function with as many of the given arguments as it takes.

    Args:
        code: whose function is called.
        given: arguments by name.

    Raises:
        ConfigError: it needs others, or raises.
    """
    function = load_function(code)
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    needs = [one.name for one in parameters if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    if other := [name for name in needs if name not in given]:
        raise ConfigError(f"{code} needs {', '.join(other)}; it is called with {', '.join(given)}: give the others a default")
    names = {one.name for one in parameters}
    try:
        return function(**{name: value for name, value in given.items() if takes_all or name in names})
    except Exception as error:
        raise ConfigError(f"{code} raises {describe_error(error)}") from error


def _refuse_in_its_own_file() -> None:
    """A script that holds the network is imported for it, and would then start the run once more."""
    if _loading:
        raise ConfigError(
            f"{_loading[-1]} starts a run when it is imported for its network: put the call below `if __name__ == '__main__':`, or the "
            "network into a file of its own"
        )


def _check_source(code: StudyCode, folder: Path) -> None:
    if len(code.source) > MAX_BYTES:
        raise ConfigError(f"{code.file} has {len(code.source)} bytes; a study's own code is one file of at most {MAX_BYTES}")
    try:
        tree = ast.parse(code.source)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{code.file}{line}: no Python: {error.msg if isinstance(error, SyntaxError) else error}") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if code.function not in defined:
        names = ", ".join(name for name in defined if not name.startswith("_")) or "nothing"
        raise ConfigError(f"{code.file} defines no function or class {code.function}; it defines {names}")
    for name in imported_names(tree):
        top = name.partition(".")[0]
        beside = not name or (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
        if beside and top not in sys.stdlib_module_names and top != "pneumofed":
            raise ConfigError(
                f"{code.file} imports {top}{', ' if top else ''}a file beside it: only the one file goes to hospitals, so write all into it"
            )


def imported_names(tree: ast.Module) -> list[str]:
    """Lists the modules that import statements name, wherever they stand; empty for a relative one."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("" if node.level else node.module or "")
    return found


@cache
def _run_file(file: str, source: bytes) -> types.ModuleType:
    digest = hashlib.sha256(source).hexdigest()
    name, shown = f"pneumofed_study_{digest[:16]}", f"<study code {digest[:12]}>/{file}"
    module = types.ModuleType(name)
    module.__file__ = shown
    lines = source.decode("utf-8", errors="replace").splitlines(keepends=True)
    linecache.cache[shown] = (len(source), None, lines, shown)  # tracebacks and `inspect` show the lines
    _loading.append(file)
    sys.modules[name] = module
    try:
        exec(compile(source, shown, "exec", dont_inherit=True), module.__dict__)
    except ConfigError:
        sys.modules.pop(name, None)
        raise
    except ModuleNotFoundError as error:
        sys.modules.pop(name, None)
        raise ConfigError(f"{file} imports {error.name}, which is not installed here; each hospital would need it too") from error
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ConfigError(f"{file} raises {describe_error(error)} when it is imported") from error
    finally:
        _loading.remove(file)
    return module


def describe_error(error: BaseException) -> str:
    """Class, first line of the text, and the line of the study's file that it came from."""
    places = [frame for frame in _frames(error) if frame[0].startswith("<study code")]
    text = str(error).strip().partition("\n")[0]
    where = f" (line {places[-1][1]})" if places else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _frames(error: BaseException) -> list[tuple[str, int]]:
    trace, found = error.__traceback__, []
    while trace is not None:
        found.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _files_in(folder: Path) -> dict[str, Path]:
    """By SHA-256: the Python files in `folder`."""
    return (
        {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.py"))} if folder.is_dir() else {}
    )
