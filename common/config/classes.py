"""What a run tells apart: the classes of its task, and which label of an image is which class.

    binary, three_class     the two named lists of classes
    a list of own classes   `task: [normal, pneumonia, tuberculosis]`; the first is `normal`

Every task is a list of classes in the order of the network's outputs (`classes_of`), and one rule says which class a label is
(`class_index`). A list that is one of the named ones is that one, so that the same task has the same hash however it was written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from pneumofed.common.errors import ConfigError

TaskName = Literal["binary", "three_class"]
CAUSES = ("bacterial", "viral")
"""Labels that also say `pneumonia`."""
Positive = Literal["pneumonia", "finding"]
SYNONYMS = {"bacteria": "bacterial", "virus": "viral", "no finding": "normal"}
"""Words of tables that are read as a label."""
MOST_CLASSES = 20
"""Each class has a two-class view of its own in the statistics of every site, 2 * 2050 counts of 8 bytes."""
CLASS_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
"""A class is a column of tables, a key of JSON and a word on pages and in DICOM objects, where this is never misread."""
_TAKEN = ("finding", "unsure", "other", "unknown", "label", "image", "patient")

_FINDING_WORDS = (
    ("hare of pneumonia", "hare of findings"),
    ("normal + pneumonia", "normal + finding"),
    ("Pneumonia", "Finding"),
    ("pneumonia", "a finding"),
)

NAMED_TASKS: dict[TaskName, tuple[str, ...]] = {
    "binary": ("normal", "pneumonia"),
    "three_class": ("normal", "bacterial", "viral"),
}
"""Classes of the named tasks, in the order of the model's outputs. Class 0 is normal."""


def read_task(value: Any) -> TaskName | tuple[str, ...]:
    """Reads a task as a configuration gives it: a name of `NAMED_TASKS`, or a list of classes.

    Args:
        value: a text, a list or a tuple.

    Returns:
        The name, also for a list that is the named task's; else the classes.

    Raises:
        ValueError: neither, or no list of classes that can be told apart; the text says what to change.
    """
    if not isinstance(value, list | tuple):
        if isinstance(value, str) and value in NAMED_TASKS:
            return value
        near = difflib.get_close_matches(str(value), NAMED_TASKS, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"expected binary, three_class or a list of classes such as [normal, pneumonia, tuberculosis]{hint}")
    _check_classes(value)
    return next((name for name, classes in NAMED_TASKS.items() if classes == tuple(value)), tuple(value))


LabelTask = Annotated[
    TaskName | tuple[str, ...],
    PlainValidator(read_task),
    PlainSerializer(lambda task: list(task) if isinstance(task, tuple) else task),
]
"""A named task or the classes of an own one. In files and on the wire a text or a list."""


def parse_task(text: str) -> TaskName | tuple[str, ...]:
    """Reads a task as a command line gives it: a name, or the classes with commas between them.

    Raises:
        ConfigError: it is no task.
    """
    names = [name.strip() for name in text.split(",")]
    try:
        return read_task(names if len(names) > 1 else names[0])
    except ValueError as error:
        raise ConfigError(f"task: {error}, got '{text}'") from None


def classes_of(task: LabelTask) -> tuple[str, ...]:
    """Returns the classes of `task`, C of at least 2, in the order of the model's outputs; class 0 is normal."""
    return task if isinstance(task, tuple) else NAMED_TASKS[task]


def positive_word(classes: Sequence[str]) -> Positive:
    """Returns what an image is called whose probability reaches the threshold, that of all classes but normal together.

    Args:
        classes: of the task, class 0 first.

    Returns:
        `pneumonia` where all of them are pneumonias, else `finding`, which is any of them.
    """
    return "pneumonia" if set(classes[1:]) <= {"pneumonia", *CAUSES} else "finding"


def in_words(sentence: str, classes: Sequence[str]) -> str:
    """Words `sentence`, which speaks of pneumonia, for a task: where its classes are not only pneumonias it speaks of findings.

    Args:
        sentence: without names of classes.
        classes: of the task.
    """
    if positive_word(classes) == "pneumonia":
        return sentence
    for before, after in _FINDING_WORDS:
        sentence = sentence.replace(before, after)
    return sentence


def task_words(task: LabelTask) -> str:
    """Writes `task` as one text: its name, or its classes as `normal/pneumonia/tuberculosis`."""
    return "/".join(task) if isinstance(task, tuple) else task


def class_index(label: str, task: LabelTask) -> int | None:
    """Looks up the class of a label.

    Args:
        label: a word of `LABELS`, or any other word.
        task: whose classes.

    Returns:
        The position in `classes_of(task)`. `bacterial` and `viral` are `pneumonia` where the task does not ask for the cause. None if the
        label has no class there, e.g. `pneumonia` of unknown cause under `three_class`.
    """
    classes = classes_of(task)
    if label in CAUSES and label not in classes:
        label = "pneumonia"
    return classes.index(label) if label in classes else None


def check_class_name(name: Any) -> str:
    """Returns `name` if a class may be called so.

    Raises:
        ValueError: it may not; the text says why.
    """
    if not isinstance(name, str) or not CLASS_NAME.fullmatch(name):
        raise ValueError(
            f"class {name!r}: expected a word of lower case letters, digits, '_' and '-' that begins with a letter, of at most 32"
        )
    if name in SYNONYMS:
        raise ValueError(f"class '{name}' is read as '{SYNONYMS[name]}' in every table; call the class so")
    if name in _TAKEN:
        raise ValueError(f"class '{name}': the word has a meaning of its own; choose another")
    return name


def is_class_name(name: str) -> bool:
    """Returns whether a class may be called `name`."""
    return bool(CLASS_NAME.fullmatch(name)) and name not in SYNONYMS and name not in _TAKEN


def _check_classes(value: list[Any] | tuple[Any, ...]) -> None:
    names = [check_class_name(name) for name in value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class '{twice[0]}' is there twice; each class once")
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(f"expected 2 to {MOST_CLASSES} classes, {len(names)} {'is' if len(names) == 1 else 'are'} there")
    if names[0] != "normal":
        raise ValueError(
            f"the first class must be 'normal', not '{names[0]}': threshold, sensitivity and specificity are those of all other "
            "classes against it"
        )
    cause = next((name for name in CAUSES if name in names), None)
    if "pneumonia" in names and cause:
        raise ValueError(
            f"'pneumonia' and '{cause}' are no two classes: a pneumonia of unknown cause could be either; keep 'pneumonia', or both causes"
        )
