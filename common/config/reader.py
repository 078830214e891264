"""Reads configurations: YAML files and overrides into the schemas of `common.config.experiment`, with errors that say what to fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from pneumofed.common.config.experiment import ExperimentConfig, Section
from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.study_code import with_study_code

T = TypeVar("T", bound=Section)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # ten times as fast where libyaml is there
    """YAML 1.1 reads `1e-5` as text; this loader reads it as the number it is (YAML 1.2)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def parse_value(text: str) -> Any:
    """Reads `text` as a YAML value, e.g. `3` -> 3, `1e-5` -> 1e-05, `fedprox` -> 'fedprox'."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in the YAML file `path`; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds something other than a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {path}: expected keys and values, got {type(content).__name__}")
    return content


def format_yaml(values: Mapping[str, Any]) -> str:
    """Writes plain values as YAML, in their order.

    Args:
        values: nested, as `read_yaml` gives them.
    """
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists in words which keys of `old` have another value in `new`, sorted.

    Args:
        old: nested values, e.g. of a run that is resumed.
        new: nested values of the same schema.
        prefix: stands before each key, e.g. `strategy.`.
    """
    found: list[str] = []
    for key, value in old.items():
        other = new.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found += differing_keys(value, other, f"{prefix}{key}.")
        elif value != other:
            found.append(f"{prefix}{key} was {value!r}, now {other!r}")
    return sorted(found)


def set_by_path(values: dict[str, Any], path: str, value: Any) -> None:
    """Puts `value` at the dotted `path` in the nested dictionary `values`, making sections on the way.

    Args:
        values: changed in place.
        path: e.g. `training.learning_rate`.
        value: takes the place of what is there.

    Raises:
        ConfigError: a part of `path` before the last names a value, not a section.
    """
    *sections, key = path.split(".")
    for section in sections:
        child = values.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: '{section}' is a value, not a section")
        values = child
    values[key] = value


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads overrides given as `section.key=value` into a nested dictionary.

    Raises:
        ConfigError: an override lacks its `=`.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"override '{override}': expected key=value, e.g. training.learning_rate=1e-3")
        set_by_path(values, path.strip(), parse_value(text))
    return values


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lays `changes` over `base`, section by section; neither is changed.

    Args:
        base: nested values.
        changes: nested values that win where both have a key; lists are replaced, not joined.

    Returns:
        A new dictionary.
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_config(schema: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """Checks plain `values` and builds a `schema` from them.

    Args:
        schema: the section to build, e.g. `ExperimentConfig`.
        values: nested values as YAML gives them; keys that are left out take their defaults.
        source: what the error begins with, such as the file's path.

    Raises:
        ConfigError: each problem with the key's path, what was expected, what came, and for an unknown key the nearest known one.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        problems = [_explain(schema, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def list_configs() -> dict[str, Path]:
    """Lists the experiments that come with the package, by name: `kaggle`, `private`, ... Empty in an app bundle, which has none."""
    folder = Path(str(files("pneumofed").joinpath("configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if "." not in path.stem}


def find_config(name: str | Path) -> Path:
    """Finds the file of an experiment: the file of that path, or else what the package has under that name, such as `kaggle`.

    Args:
        name: a path, which wins; or a name of `list_configs`, also as `configs/kaggle.yaml` where no such folder is.

    Raises:
        ConfigError: there is neither.
    """
    path, known = Path(name), list_configs()
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    if path.parent == Path("configs") and path.suffix == ".yaml" and path.stem in known:
        return known[path.stem]
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'? " if near else ""
    ready = f"; {hint}these come with pneumofed: {', '.join(known)}" if known else ""
    raise ConfigError(f"configuration file {name} does not exist{ready}")


SIMULATION_SECTION = "simulation"
"""Of an experiment's file: keys of `simulation.hospitals.sources.SimulationConfig`."""


def load_experiment(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Reads an experiment from a YAML file and lays overrides over it.

    Args:
        path: the YAML file, or a name of `list_configs`; None for the defaults only. Its section `simulation` is for virtual hospitals,
            and no part of the experiment. A network or loss may be `FILE.py:FUNCTION`, which is read here.
        overrides: nested values, such as those of `parse_overrides`.

    Raises:
        ConfigError: the file cannot be read, or the values do not fit the schema.
    """
    values = {key: value for key, value in (read_yaml(find_config(path)) if path else {}).items() if key != SIMULATION_SECTION}
    return build_config(ExperimentConfig, with_study_code(merge(values, overrides or {})), str(path or "experiment"))


def experiment_from_json(text: str) -> ExperimentConfig:
    """Reads the experiment that `ExperimentConfig.model_dump_json` wrote.

    Raises:
        ConfigError: the text was written by another version of the schema or was altered.
    """
    try:
        return ExperimentConfig.model_validate_json(text)
    except ValidationError as error:
        problems = [_explain(ExperimentConfig, problem) for problem in error.errors()]
        raise ConfigError("experiment of the run: " + "; ".join(problems)) from None


def _explain(schema: type[Section], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(schema, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{path}: is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    came = problem["input"]
    hint = ""
    if problem["type"] == "literal_error" and isinstance(came, str):
        near = difflib.get_close_matches(came, _choices_at(schema, problem["loc"]), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{path}: {message[0].lower()}{message[1:]}, got {came!r}{hint}"


def _schema_at(schema: type[Section], location: Sequence[Any]) -> type[Section]:
    for part in location:
        field = schema.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return schema
        schema = field.annotation
    return schema


def _keys_at(schema: type[Section], location: Sequence[Any]) -> list[str]:
    return list(_schema_at(schema, location).model_fields)


def _choices_at(schema: type[Section], location: Sequence[Any]) -> list[str]:
    field = _schema_at(schema, location[:-1]).model_fields.get(str(location[-1]))
    return [str(choice) for choice in get_args(field.annotation)] if field else []
